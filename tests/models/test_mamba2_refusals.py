"""Mamba-2 checkpoints that are not what they say, and relatives of the model: refused, by name."""

import inspect
import json
import resource

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from mamba2_files import IDS, MISTRAL, MISTRALS, ORIGINAL, mistral, original, write
from safetensors.torch import load_file, save_file

import pyseq


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
    ("ssm_cfg", cfg(norm_eps=0.1), "norm_eps"),   # ours: mamba-ssm's layer has neither
    ("ssm_cfg", cfg(d_inner=64), "d_inner"),
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
