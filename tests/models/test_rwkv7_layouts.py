"""RWKV-7 checkpoints in every layout, against the equations token by token on the tensors as they are written."""

import pytest
import torch
from rwkv7_files import CONFIG, IDS, LOWER, authors, fla, lower, write
from rwkv7_loop import checkpoint, logits
from safetensors.torch import load_file

import pyseq
from pyseq.models import convert_checkpoint

LAYOUTS = {
    "fla": lambda z: (fla(z), CONFIG),
    "fla, old": lambda z: (fla(z, old=True), CONFIG),
    "lower": lambda z: (lower(z), LOWER),
    "authors": lambda z: (z, None),
}


def assert_right(got, want):
    """Logits [T, V] within 1e-3 of their standard deviation, and the same most probable tokens."""
    assert (got.double() - want).abs().max() < 1e-3 * want.std()
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@pytest.fixture(params=LAYOUTS)
def read(request, tmp_path):
    """A function: the checkpoint z in one of the layouts, read."""
    return lambda z, **options: pyseq.from_pretrained(write(tmp_path, *LAYOUTS[request.param](z)), **options)


def test_logits(read):
    z = authors()
    model = read(z)
    assert model.config.layer_args == {
        "head_size": 64, "d_ffn": 512, "decay_rank": 32, "iclr_rank": 64, "value_rank": 48, "gate_rank": 24,
    }  # fmt: skip
    with torch.no_grad():
        for row in IDS:
            assert_right(model(row[None]).logits[0], logits(z, row))


def test_greedy_text(read):
    z, ids = authors(seed=1), IDS[:1, :5]
    model = read(z).pack()
    got = model.generate(ids, 8, temperature=0)[0]
    for t in range(5, 13):
        assert got[t] == logits(z, got[:t])[-1].argmax()


def test_types(read):
    z = authors(torch.bfloat16)
    model = read(z)
    assert model.backbone.layers[0].att.receptance.weight.dtype == torch.bfloat16
    assert model.backbone.layers[1].att.w0.dtype == model.backbone.norm_0.weight.dtype == torch.float32
    assert torch.equal(model.backbone.layers[1].att.mix[4], z["blocks.1.att.x_a"].flatten().float())
    want = logits(z, IDS[0])
    with torch.no_grad():
        got = model(IDS[:1]).logits[0]
        assert (got - want).abs().max() < 0.2 * want.std()
        assert_right(model.float()(IDS[:1]).logits[0], want)
    assert read(z, dtype=torch.float64).backbone.norm_f.weight.dtype == torch.float64


def test_ours_again(read, tmp_path):
    model = read(authors(torch.bfloat16))
    model.save_pretrained(tmp_path / "ours")
    again = pyseq.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for (name, p), (_, q) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
        assert getattr(p, "_no_weight_decay", False) == getattr(q, "_no_weight_decay", False), name


@pytest.mark.parametrize("config", [False, True])
def test_a_pickle_is_converted(config, tmp_path):
    z = authors(torch.bfloat16)
    torch.save(z, tmp_path / "RWKV-x070.pth")
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "rwkv7", "bos_token_id": 3}')
    with pytest.raises(ValueError, match="pyseq convert"):
        pyseq.from_pretrained(tmp_path / "RWKV-x070.pth")
    for source in (tmp_path / "RWKV-x070.pth", tmp_path):
        convert_checkpoint(source, tmp_path / "out")
        model = pyseq.from_pretrained(tmp_path / "out")
        assert model.config.eos_token_id == 0 and model.config.bos_token_id == (3 if config else 0)
        with torch.no_grad():
            assert_right(model.float()(IDS[:1]).logits[0], logits(z, IDS[0]))


def test_several_pickles_and_no_config(tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save(authors(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="name one file"):
        convert_checkpoint(tmp_path, tmp_path / "out")


def test_heads_of_other_sizes(tmp_path):
    z = checkpoint(head=32)
    with torch.no_grad():
        model = pyseq.from_pretrained(write(tmp_path, z))
        assert_right(model(IDS[:1]).logits[0], logits(z, IDS[0], head=32))


def test_flat_bonus(tmp_path):
    """Some files hold r_k [D]; then heads are of 64."""
    z = authors()
    flat = {name: t.flatten() if name.endswith("r_k") else t for name, t in z.items()}
    with torch.no_grad():
        assert_right(pyseq.from_pretrained(write(tmp_path, flat))(IDS[:1]).logits[0], logits(z, IDS[0]))


def test_one_layer(tmp_path):
    z = checkpoint(layers=1)
    z = {name: t for name, t in z.items() if ".att.v" not in name or name.endswith("value.weight")}
    with torch.no_grad():
        assert_right(pyseq.from_pretrained(write(tmp_path, z))(IDS[:1]).logits[0], logits(z, IDS[0]))


def test_the_first_layer_of_fla_may_hold_values_too(tmp_path):
    tensors = fla(authors())
    tensors |= {n.replace("layers.1.", "layers.0."): t for n, t in tensors.items() if ".1.attn.v_lora" in n}
    model = pyseq.from_pretrained(write(tmp_path, tensors, CONFIG))
    assert not hasattr(model.backbone.layers[0].att, "v1")


def test_shards_are_one_checkpoint(tmp_path):
    import json

    z = fla(authors())
    write(tmp_path, z, CONFIG)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    from safetensors.torch import save_file

    half = dict(list(tensors.items())[::2])
    rest = {name: t for name, t in tensors.items() if name not in half}
    for name, part in (("a.safetensors", half), ("b.safetensors", rest)):
        save_file(part, tmp_path / name)
    index = {name: "a.safetensors" if name in half else "b.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with torch.no_grad():
        assert_right(pyseq.from_pretrained(tmp_path)(IDS[:1]).logits[0], logits(authors(), IDS[0]))
