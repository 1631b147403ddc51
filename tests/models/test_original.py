"""The layout of the original state-spaces checkpoints, as pickles and converted to safetensors."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import pyseq
from pyseq.models import convert_checkpoint

IDS = torch.arange(24).reshape(2, 12) % 61


def original(model):
    """Tensors and config.json as the original code writes them: `embedding`, and a tied head that is there twice."""
    tensors = {n.replace("embeddings", "embedding"): t.clone() for n, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    config = {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {"d_state": 8},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    return tensors, config


def write(folder, tensors, config):
    save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors(tiny, prefix, tmp_path):
    model = tiny()
    tensors, config = original(model)
    write(tmp_path, {prefix + name: t for name, t in tensors.items()}, config)
    read = pyseq.from_pretrained(tmp_path)
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    assert read.config.vocab_size == 61 and read.config.padded_vocab_size == 64 and read.config.tie_embeddings
    assert torch.equal(pyseq.from_pretrained(tmp_path / "model.safetensors")(IDS).logits, model(IDS).logits)


def test_untied(tiny, tmp_path):
    model = tiny(tie_embeddings=False)
    tensors, config = original(model)
    write(tmp_path, tensors, {**config, "tie_embeddings": False})
    assert torch.equal(pyseq.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    write(tmp_path, tensors, {**config, "tie_embeddings": True})
    with pytest.raises(ValueError, match="different head"):
        pyseq.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("new_format", [False, True])
def test_conversion(tiny, name, nested, new_format, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    tensors, config = original(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = {"state_dict": tensors, "step": 3} if nested else tensors
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new_format)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="pyseq convert"):
            pyseq.from_pretrained(path)
    convert_checkpoint(tmp_path, tmp_path / "from_folder")
    convert_checkpoint(tmp_path / name, tmp_path / "from_file")
    for folder in ("from_folder", "from_file"):
        read = pyseq.from_pretrained(tmp_path / folder)
        assert torch.equal(read(IDS).logits, model(IDS).logits)


def test_conversion_of_safetensors(tiny, tmp_path):
    model = tiny()
    write(tmp_path, *original(model))
    convert_checkpoint(tmp_path, tmp_path / "from_folder")
    convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "from_file")
    for folder in ("from_folder", "from_file"):
        assert torch.equal(pyseq.from_pretrained(tmp_path / folder)(IDS).logits, model(IDS).logits)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_pickles_run_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, config = original(tiny())
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({**tensors, "x": Bomb()}, tmp_path / "zip.bin")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({**tensors, "x": Bomb()}, protocol=2))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "zip.bin").read_bytes()[:5000])
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"a": 1}, tmp_path / "number.bin")
    for name in ("zip", "bare", "cut", "empty", "list", "number"):
        with pytest.raises(ValueError, match=name):
            convert_checkpoint(tmp_path / f"{name}.bin", tmp_path / "out")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="src"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="src"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    torch.save({}, tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert_checkpoint(tmp_path / "a.bin", tmp_path / "out")


@pytest.mark.parametrize(
    "field, value",
    [
        ("ssm_cfg", {"layer": "Mamba2"}),
        ("ssm_cfg", 3),
        ("ssm_cfg", {"d_state": 8, "dt_rank": 7}),
        ("ssm_cfg", {"d_state": 8, "expand": 4}),
        ("attn_layer_idx", [1]),
        ("d_intermediate", 64),
        ("rms_norm", False),
        ("d_model", 33),
        ("n_layer", 3),
        ("vocab_size", 80),
        ("vocab_size", "61"),
        ("pad_vocab_size_multiple", 0),
    ],
)
def test_what_we_do_not_read_is_refused(tiny, field, value, tmp_path):
    tensors, config = original(tiny())
    write(tmp_path, tensors, {**config, field: value})
    name = {"ssm_cfg": "layer|ssm_cfg|dt_rank|expand"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        pyseq.from_pretrained(tmp_path)


def test_mamba2_tensors_are_named(tiny, tmp_path):
    tensors, config = original(tiny())
    tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(4)
    write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match="Mamba-2"):
        pyseq.from_pretrained(tmp_path)
