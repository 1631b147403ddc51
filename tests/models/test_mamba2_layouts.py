"""The layouts of Mamba-2 checkpoints, of the original code and of Mistral, and the way back."""

import json

import pytest
import torch
from mamba2_files import IDS, MISTRALS, ORIGINAL, mistral, original, write

import pyseq
from pyseq.models import convert_checkpoint, pretrained

RARE = {
    "usual": {},
    "biased": {"bias": True, "conv_bias": False, "d_conv": 3},
    "one group": {"ngroups": 1},
    "mlp": {"d_ssm": 32},
    "no norm": {"rmsnorm": False},
    "norm first": {"norm_before_gate": True},
    "D per channel": {"D_has_hdim": True},
    "limited": {"dt_limit": [0.01, 0.05]},
    "expanded": {"expand": 3},
}


@pytest.mark.parametrize("options", RARE.values(), ids=RARE)
def test_original(padded, options, tmp_path):
    model = padded(layer_args=options)
    config = {**ORIGINAL, "ssm_cfg": {**ORIGINAL["ssm_cfg"], **options}}
    write(tmp_path, original(model), config)
    read = pyseq.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert read.config.vocab_size == 61 and read.config.padded_vocab_size == 64 and read.config.tie_embeddings
    # What the tensors say is not asked of the config, but for G and N, whose product alone they say, and the rest.
    said = {k: v for k, v in options.items() if k in ("ngroups", "norm_before_gate", "dt_limit", "expand")}
    short = {"layer": "Mamba2", "d_state": 8, "ngroups": 2, **said}
    write(tmp_path, original(model), {**config, "ssm_cfg": short})
    assert torch.equal(pyseq.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("options", RARE.values(), ids=RARE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tiny2, options, dtype, tmp_path):
    model = tiny2(dtype=dtype, layer_args=options, tie_embeddings=False)
    model.save_pretrained(tmp_path)
    read = pyseq.from_pretrained(tmp_path)
    assert read.config == model.config and torch.equal(read(IDS).logits, model(IDS).logits)
    for (name, p), (_, q) in zip(read.named_parameters(), model.named_parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q), name
        assert getattr(p, "_no_weight_decay", False) == getattr(q, "_no_weight_decay", False)
    theirs = not set(options) & {"d_ssm", "rmsnorm", "norm_before_gate", "D_has_hdim"}
    assert ("model_type" in json.loads((tmp_path / "config.json").read_text())) == theirs


def test_another_eps_in_the_layers_is_not_for_transformers(tiny2, tmp_path):
    tiny2(layer_args={"norm_eps": 1e-3}).save_pretrained(tmp_path)
    assert "model_type" not in json.loads((tmp_path / "config.json").read_text())
    tiny2(layer_args={"norm_eps": 1e-3}, norm_eps=1e-3).save_pretrained(tmp_path)
    assert "model_type" in json.loads((tmp_path / "config.json").read_text())


def test_a_half_checkpoint_is_widened_where_it_matters(padded, tmp_path):
    write(tmp_path, {name: t.bfloat16() for name, t in original(padded()).items()})
    mixer = pyseq.from_pretrained(tmp_path).backbone.layers[1].mixer
    assert mixer.in_proj.weight.dtype == mixer.conv1d.weight.dtype == torch.bfloat16
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_bias, mixer.norm.weight)} == {torch.float32}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_conversion(padded, name, tmp_path):
    model = padded()
    torch.save(original(model), tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    with pytest.raises(ValueError, match="pyseq convert"):
        pyseq.from_pretrained(tmp_path)
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert torch.equal(pyseq.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_the_layout_of_mistral(tiny2, tmp_path):
    model = tiny2(**MISTRALS)
    mistral(tmp_path, model)
    for path in (tmp_path, tmp_path / "consolidated.safetensors"):
        read = pyseq.from_pretrained(path)
        assert torch.equal(read(IDS).logits, model(IDS).logits)
        assert read.config.eos_token_id == 2 and read.config.bos_token_id == 1
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert torch.equal(pyseq.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_codestral_has_both_layouts_in_one_folder(tiny2, tmp_path, monkeypatch):
    """The folder is read as transformers', the file of Mistral's with its own params.json."""
    model = tiny2(**MISTRALS)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["pyseq"]
    (tmp_path / "config.json").write_text(json.dumps({**raw, "norm_before_gate": True, "vocab_size": 61}))
    mistral(tmp_path, model)
    for path, end in ((tmp_path, None), (tmp_path / "consolidated.safetensors", 2)):
        read = pyseq.from_pretrained(path)
        assert torch.equal(read(IDS).logits, model(IDS).logits) and read.config.eos_token_id == end
    asked = []

    def download(name, allow_patterns, ignore_patterns=()):
        asked.append(tuple(ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(pretrained.huggingface_hub, "snapshot_download", download)
    pyseq.from_pretrained("mistralai/Mamba-Codestral-7B-v0.1")
    assert asked == [("consolidated*",)]
