"""RWKV-7 checkpoints that are not what they say, and its relatives: refused, by name."""

import inspect
import json
import resource

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from rwkv7_files import CONFIG, IDS, LOWER, authors, fla, lower, write
from safetensors.torch import load_file, save_file

import pyseq
from pyseq.models import convert_checkpoint


@pytest.mark.parametrize("field, value, word", [
    ("model_type", "mamba", "model_type is 'mamba'.*RWKV-7"),
    ("model_type", 7, "model_type"),
    ("attn", {"layers": [1]}, "attention"),
    ("hidden_size", 64, "hidden_size"),
    ("hidden_size", "128", "hidden_size"),
    ("num_hidden_layers", 10**9, "num_hidden_layers"),
    ("vocab_size", 60, "vocab_size"),
    ("head_dim", 32, "head_dim"),
    ("num_heads", 4, "num_heads"),
    ("intermediate_size", 448, "intermediate_size"),
    ("decay_low_rank_dim", 64, "decay_low_rank_dim"),
    ("a_low_rank_dim", 32, "a_low_rank_dim"),
    ("v_low_rank_dim", 32, "v_low_rank_dim"),
    ("gate_low_rank_dim", 128, "gate_low_rank_dim"),
    ("value_dim", 256, "value_dim"),
    ("value_dim", [128, 256], "value_dim"),
    ("hidden_act", "silu", "hidden_act"),
    ("norm_first", False, "norm_first"),
    ("norm_bias", False, "norm_bias"),
    ("norm_eps", 0, "norm_eps"),
    ("norm_eps", "1e-5", "norm_eps"),
    ("tie_word_embeddings", True, "head"),
    ("eos_token_id", -1, "eos_token_id"),
])  # fmt: skip
def test_lies_of_the_config(field, value, word, tmp_path):
    write(tmp_path, fla(authors()), {**CONFIG, field: value})
    with pytest.raises(ValueError, match=word):
        pyseq.from_pretrained(tmp_path)


def test_lies_of_the_other_config(tmp_path):
    write(tmp_path, lower(authors()), {**LOWER, "value_low_rank_dim": 47})
    with pytest.raises(ValueError, match="value_low_rank_dim"):
        pyseq.from_pretrained(tmp_path)


def relatives():
    D = torch.zeros(1, 1, 128)
    old = {"blocks.0.att.receptance.weight": torch.zeros(128, 128), "emb.weight": torch.zeros(61, 128)}
    seven = authors()
    return {
        "RWKV-4": {**old, "blocks.0.att.time_first": D.flatten(), "blocks.0.att.time_mix_k": D},
        "RWKV-4 ": {"rwkv.blocks.0.attention.time_first": D.flatten()},
        "RWKV-5": {**old, "blocks.0.att.time_faaaa": torch.zeros(2, 64), "blocks.0.att.time_mix_k": D},
        "RWKV-6": {**old, "blocks.0.att.time_faaaa": torch.zeros(2, 64), "blocks.0.att.time_maa_x": D},
        "RWKV-6 ": {"model.layers.0.attn.x_proj.0.weight": torch.zeros(160, 128)},
        "DeepEmbed": {**seven, "blocks.0.ffn.s_emb.weight": torch.zeros(61, 1024)},
        "DeepEmbed ": {**seven, "blocks.0.ffn.s1": torch.zeros(128, 32)},
    }


@pytest.mark.parametrize("what", relatives())
def test_relatives_are_known_by_their_tensors(what, tmp_path):
    tensors = relatives()[what]
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=what.strip()):
        pyseq.from_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=what.strip()):
        convert_checkpoint(tmp_path / "old.pth", tmp_path / "out")


@pytest.mark.parametrize("kind, word", [("rwkv", "RWKV-4"), ("rwkv6", "RWKV-6"), ("rwkv7", "not those of RWKV-7")])
def test_relatives_are_known_by_their_config(kind, word, tmp_path):
    write(tmp_path, {"weight": torch.zeros(3)}, {"model_type": kind})
    with pytest.raises(ValueError, match=word):
        pyseq.from_pretrained(tmp_path)


FIRST, SECOND = "blocks.0.", "blocks.1."
HOSTILE = {
    "few": {"att.w1": None},
    "no mix": {"att.x_a": None},
    "no norm": {"ln1.bias": None},
    "more": {"att.time_shift": torch.zeros(3)},
    "heads": {"att.r_k": torch.zeros(3, 64)},
    "heads of three": {"att.r_k": torch.zeros(128, 3)},
    "no heads": {"att.r_k": torch.zeros(0, 64)},
    "flat heads": {"att.r_k": torch.zeros(127)},
    "mix of two": {"att.x_a": torch.zeros(2, 1, 64)},
    "short mix": {"att.x_a": torch.zeros(1, 1, 127)},
    "scalar": {"att.k_a": torch.zeros(())},
    "square mix": {"ffn.x_k": torch.zeros(128, 128)},
    "turned": {"att.w1": torch.zeros(32, 128)},
    "no rank": {"att.g1": torch.zeros(128, 0), "att.g2": torch.zeros(0, 128)},
    "ranks apart": {"att.a1": torch.zeros(128, 32)},
    "wide": {"ffn.value.weight": torch.zeros(128, 1 << 12)},
    "flat": {"att.output.weight": torch.zeros(128 * 128)},
    "numbers": {"att.w0": torch.zeros(1, 1, 128, dtype=torch.int32)},
}


@pytest.mark.parametrize("lie", HOSTILE)
@pytest.mark.parametrize("layer", [FIRST, SECOND])
def test_tensors_that_do_not_fit(lie, layer, tmp_path):
    tensors = authors()
    for name, t in HOSTILE[lie].items():
        tensors.pop(layer + name, None)
        tensors |= {} if t is None else {layer + name: t}
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"checkpoint|head_size|I32"):
        pyseq.from_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"checkpoint|head_size"):
        convert_checkpoint(tmp_path / "x.pth", tmp_path / "out")


@pytest.mark.parametrize("name", ["blocks.0.ln0.weight", "ln_out.bias", "emb.weight", "head.weight"])
def test_something_around_the_layers_is_missing(name, tmp_path):
    tensors = authors()
    del tensors[name]
    if name == "blocks.0.ln0.weight":
        del tensors["blocks.0.ln0.bias"]
    write(tmp_path, tensors, {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"missing|ln0"):
        pyseq.from_pretrained(tmp_path)


def test_an_embedding_is_the_head_where_a_config_says_so(tmp_path):
    tensors = authors()
    del tensors["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight' is missing"):
        pyseq.from_pretrained(write(tmp_path / "alone", tensors))
    model = pyseq.from_pretrained(write(tmp_path / "tied", tensors, {"tie_word_embeddings": True}))
    assert model.lm_head is None and model(IDS).logits.shape[-1] == 61


def test_the_mix_twice(tmp_path):
    tensors = fla(authors())
    tensors["model.layers.0.attn.x_x"] = torch.zeros(6, 128)
    write(tmp_path, tensors, CONFIG)
    with pytest.raises(ValueError, match="unexpected"):
        pyseq.from_pretrained(tmp_path)


def test_a_gap_in_the_layers(tmp_path):
    write(tmp_path, {name.replace("blocks.1", "blocks.7"): t for name, t in authors().items()})
    with pytest.raises(ValueError, match="numbered"):
        pyseq.from_pretrained(tmp_path)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("false",)


def test_a_pickle_runs_nothing(tmp_path):
    torch.save({**authors(), "x": Evil()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="plain tensors"):
        convert_checkpoint(tmp_path / "x.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mamba_still_needs_a_config(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config"):
        pyseq.from_pretrained(tmp_path)


values = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([8, 10**9, 10**30]) | st.floats()
    | st.text(max_size=3) | st.lists(st.floats() | st.integers(-1, 3), max_size=3)
)  # fmt: skip
arguments = list(inspect.signature(pyseq.RWKV7).parameters)


@hypothesis.settings(deadline=None, max_examples=40, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.dictionaries(st.sampled_from(arguments), values, max_size=2))
def test_absurd_arguments_of_the_layer(tiny7, tmp_path, changes):
    """Loads, or says ValueError; never a crash, never the memory of a claimed size."""
    tiny7().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["pyseq"]["layer_args"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (1 << 20)
    try:
        pyseq.from_pretrained(tmp_path)(IDS)
    except ValueError as error:
        assert "config" in str(error) or "checkpoint" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


@pytest.mark.parametrize("name", ["att.mix", "att.r_k", "att.w1.weight", "ffn.mix", "ln2.bias"])
def test_our_tensors_that_do_not_fit(tiny7, name, tmp_path):
    tiny7().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.layers.1." + name] = torch.zeros(7, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint"):
        pyseq.from_pretrained(tmp_path)
