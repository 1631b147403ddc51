"""Mamba-2 models: the layouts of the original code and of Mistral, relatives that are refused, and generation."""

import inspect
import json
import resource

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyseq
from pyseq.models import convert_checkpoint, pretrained
from pyseq.models import state as states

IDS = torch.arange(24).reshape(2, 12) % 61
ORIGINAL = {
    "d_model": 32,
    "n_layer": 2,
    "d_intermediate": 0,
    "vocab_size": 61,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MISTRAL = {
    "dim": 32,
    "n_layers": 2,
    "vocab_size": 61,
    "n_groups": 2,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}
# A model that it describes: the size of the state it does not say.
MISTRALS = {"tie_embeddings": False, "pad_vocab_size_multiple": 1, "layer_args": {"d_state": 128}}


def original(model):
    """Tensors as the original code writes them: `embedding`, and a tied head that is there twice."""
    tensors = {n.replace("embeddings", "embedding"): t.clone() for n, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    return tensors


def write(folder, tensors, config=ORIGINAL, weights="model.safetensors", name="config.json"):
    folder.mkdir(exist_ok=True)
    save_file({name: t.clone() for name, t in tensors.items()}, folder / weights)
    (folder / name).write_text(json.dumps(config))


@pytest.fixture
def padded(tiny2):
    """61 tokens in 64 rows, as the original checkpoints pad."""
    return lambda **options: tiny2(pad_vocab_size_multiple=16, **options)


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


def mistral(folder, model):
    tensors = {"model." + name: t for name, t in original(model).items()}
    write(folder, tensors, MISTRAL, "consolidated.safetensors", "params.json")


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


@pytest.mark.parametrize("field, value", [
    ("dim", 64), ("dim", None), ("n_layers", 3), ("n_groups", 3), ("n_groups", 0), ("vocab_size", 60),
    ("tie_embeddings", True), ("rms_norm", False),
])  # fmt: skip
def test_lies_of_mistral(tiny2, field, value, tmp_path):
    model = tiny2(**MISTRALS)
    mistral(tmp_path, model)
    (tmp_path / "params.json").write_text(json.dumps({**MISTRAL, field: value}))
    if value is None:
        pyseq.from_pretrained(tmp_path)   # what is not said is not wrong
        return
    word = {"dim": "d_model", "n_layers": "n_layer", "tie_embeddings": "head"}.get(field, field)
    with pytest.raises(ValueError, match=word):
        pyseq.from_pretrained(tmp_path)


def cfg(**options):
    return {**ORIGINAL["ssm_cfg"], **options}


@pytest.mark.parametrize("field, value, word", [
    ("attn_layer_idx", [1], "attn_layer_idx is .*attention"),
    ("d_intermediate", 64, "d_intermediate is 64, blocks with an MLP"),
    ("ssm_cfg", {"layer": "Mamba3"}, "Mamba3"),
    ("ssm_cfg", {"layer": ["Mamba2"]}, "layer"),
    ("ssm_cfg", {"layer": "Mamba1"}, "as in Mamba-2"),
    ("ssm_cfg", [], "ssm_cfg"),
    ("ssm_cfg", cfg(expand=4), "expand"),
    ("ssm_cfg", cfg(d_state=16), "d_state"),
    ("ssm_cfg", cfg(d_state="8"), "d_state"),
    ("ssm_cfg", cfg(ngroups=3), "ngroups"),
    ("ssm_cfg", cfg(headdim=16), "headdim"),
    ("ssm_cfg", cfg(d_ssm=32), "d_ssm"),
    ("ssm_cfg", cfg(rmsnorm=False), "rmsnorm"),
    ("ssm_cfg", cfg(norm_before_gate=1), "norm_before_gate"),
    ("ssm_cfg", cfg(dt_limit=[2, 1]), "dt_limit"),
    ("ssm_cfg", cfg(rotary=True), "rotary"),
    ("rms_norm", False, "rms_norm"),
    ("d_model", 33, "d_model"),
    ("n_layer", 10**9, "n_layer"),
    ("vocab_size", 80, "vocab_size"),
])  # fmt: skip
def test_what_we_do_not_read_is_refused(padded, field, value, word, tmp_path):
    write(tmp_path, original(padded()), {**ORIGINAL, field: value})
    with pytest.raises(ValueError, match=word):
        pyseq.from_pretrained(tmp_path)


FIRST = "backbone.layers.0.mixer."
SECOND = "backbone.layers.1.mixer."
RELATIVES = {
    "attention": lambda t: t.update({"backbone.layers.1.mixer.Wqkv.weight": torch.zeros(96, 32)}),
    "Mamba-3": lambda t: [t.pop(SECOND + name) for name in ("A_log", "conv1d.weight")],
    "an MLP": lambda t: t.update({"backbone.layers.1.mlp.fc1.weight": torch.zeros(64, 32)}),
    "has no A_log: attention": lambda t: [t.pop(SECOND + name) for name in ("A_log", "D", "dt_bias", "norm.weight")],
}


@pytest.mark.parametrize("what", RELATIVES)
def test_relatives_are_known_by_their_tensors(padded, what, tmp_path):
    tensors = original(padded())
    RELATIVES[what](tensors)
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=what):
        pyseq.from_pretrained(tmp_path)


HOSTILE = {
    "A_log of no heads": {"A_log": torch.zeros(0)},
    "A_log has two dimensions": {"A_log": torch.zeros(8, 2)},
    "more heads than fit": {"A_log": torch.zeros(7)},
    "odd": {"in_proj.weight": torch.zeros(169, 32)},
    "short": {"in_proj.weight": torch.zeros(130, 32)},
    "few channels": {"conv1d.weight": torch.zeros(30, 1, 4)},
    "wide kernel": {"conv1d.weight": torch.zeros(96, 2, 4)},
    "flat": {"out_proj.weight": torch.zeros(2048)},
    "wide": {"out_proj.weight": torch.zeros(32, 1 << 12)},
    "norm": {"norm.weight": torch.zeros(63)},
    "D": {"D": torch.zeros(9)},
    "bias": {"dt_bias": torch.zeros(8, 1)},
    "numbers": {"A_log": torch.zeros(8, dtype=torch.int32)},
}


@pytest.mark.parametrize("lie", HOSTILE)
@pytest.mark.parametrize("layer", [FIRST, SECOND])
@pytest.mark.parametrize("layout", ["ours", "original"])
def test_tensors_that_do_not_fit(padded, lie, layer, layout, tmp_path):
    model = padded()
    if layout == "ours":
        model.save_pretrained(tmp_path)
    else:
        write(tmp_path, original(model))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.update({layer + name: t for name, t in HOSTILE[lie].items()})
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint|F32"):
        pyseq.from_pretrained(tmp_path)


values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([8, 10**9, 10**30])
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.floats() | st.integers(-1, 3), max_size=3)
)
arguments = list(inspect.signature(pyseq.Mamba2).parameters)


@hypothesis.settings(deadline=None, max_examples=80, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.dictionaries(st.sampled_from(arguments), values, max_size=2))
def test_absurd_arguments_of_the_layer(tiny2, tmp_path, changes):
    """Loads, or says ValueError; never a crash, never the memory of a claimed size."""
    tiny2().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["pyseq"]["layer_args"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (1 << 20)
    try:
        pyseq.from_pretrained(tmp_path)(IDS)
    except ValueError as error:
        assert "config" in str(error) or "checkpoint" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def close(got, want, rtol=2e-5):
    assert (got - want).abs().max() <= rtol * want.abs().max()


def test_prefill_and_steps_equal_the_whole(tiny2):
    model = tiny2()
    with torch.no_grad():
        whole = model(IDS)
        logits, state = model(IDS[:, :5])
        parts = [logits]
        other = states.clone(state)
        stepper = model.stepper(other)
        for t in range(5, 12):
            logits, state = model.step(IDS[:, t], state)
            assert torch.equal(stepper(IDS[:, t]), logits)
            parts.append(logits[:, None])
    close(torch.cat(parts, 1), whole.logits)
    for layer, want in zip(state, whole.state, strict=True):
        close(layer.ssd, want.ssd)
        close(layer.conv, want.conv)


def test_a_prompt_in_passes_is_the_prompt(tiny2, monkeypatch):
    from pyseq.models import generation

    model, mask = tiny2(), torch.ones_like(IDS)
    mask[1, :5] = 0
    monkeypatch.setattr(generation, "_CHUNK", 5)
    pieces = generation._prefill(model, IDS, None, mask)
    close(pieces.logits[:, 0], model(IDS, attention_mask=mask).logits[:, -1])


def test_left_padding_equals_each_row_alone(tiny2):
    model, mask = tiny2(), torch.ones_like(IDS)
    mask[1, :7] = 0
    with torch.no_grad():
        close(model(IDS, attention_mask=mask).logits[1:, 7:], model(IDS[1:, 7:]).logits)
    batch = model.generate(IDS, 12, attention_mask=mask, temperature=0)
    assert torch.equal(batch[1:, 12:], model.generate(IDS[1:, 7:], 12, temperature=0)[:, 5:])


def test_packed_documents_equal_each_alone(tiny2):
    model, ids = tiny2(), IDS.reshape(1, 24)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor([0, 9, 9, 24]))
        close(packed.logits[:, :9], model(ids[:, :9]).logits)
        close(packed.logits[:, 9:], model(ids[:, 9:]).logits)
        close(packed.state[1].ssd[2:], model(ids[:, 9:]).state[1].ssd)
    assert not packed.state[0].ssd[1].any()


def test_steps_run_on_a_bfloat16_state(either):
    model = either()
    with torch.no_grad():
        state = model(IDS[:, :8]).state
        half = states.copy_(model.init_state(2, dtype=torch.bfloat16), state)
        for t in range(8, 12):
            want, state = model.step(IDS[:, t], state)
            got, half = model.step(IDS[:, t], half)
            close(got, want, 2e-2)
    assert half[0][1].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"state .*bfloat16"):
        model(IDS, half)


def test_generation_goes_on_from_its_state(tiny2, tmp_path):
    model = tiny2()
    whole = model.generate(IDS, 20, temperature=0)
    ids, state = model.generate(IDS, 8, temperature=0, return_state=True)
    states.save(state, tmp_path / "state.safetensors")
    again = states.load(tmp_path / "state.safetensors", like=model.init_state(2))
    assert torch.equal(model.generate(ids[:, -1:], 12, temperature=0, state=again)[:, 1:], whole[:, 20:])
