"""Loading and saving: safetensors only. Pickles are converted first, by `convert_checkpoint` or `pyseq convert`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import save_file

from pyseq.models import layouts
from pyseq.models.causal_lm import CausalLM
from pyseq.models.config import Config
from pyseq.models.files import TensorFile, TensorFiles, Tensors, read_json, replacing, shards
from pyseq.models.text import load_tokenizer
from pyseq.models.world import VOCABULARY, world_tokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MISTRAL, PARAMS = "consolidated*", "params.json"  # Mistral's layout, often beside transformers' of the same weights
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = [
    *(CONFIG, PARAMS, "generation_config.json", "tokenizer.json", VOCABULARY),
    *("*.safetensors", "*.safetensors.index.json"),
]


def from_pretrained(path: str | os.PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None) -> CausalLM:
    """Reads a model from a folder, a .safetensors file with its config.json beside it, or a Hub id.

    Layouts: this package's, transformers' Mamba, FalconMamba and Mamba-2 (sharded or not), the original state-spaces
    checkpoints of both converted to safetensors, Mistral's consolidated.safetensors with params.json, and RWKV-7's as
    fla writes them or under the authors' names. `dtype` None keeps the weights' type; A_log, D, the steps' bias,
    norm weights and RWKV-7's vectors are float32 in any case. The model is in evaluation mode. Raises ValueError for
    files that do not hold what their config says, and for models of other kinds, hybrids with attention among them.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type, got {dtype}")
    folder, files = _find(path)
    tensors: Tensors = TensorFile(files[0]) if len(files) == 1 else TensorFiles(files)
    config = _config_beside(folder, files[0])
    if config is None and layouts.needs_config(tensors):
        raise FileNotFoundError(f"path: no {CONFIG} in {folder}; a checkpoint needs the one it was published with")
    raw = {} if config is None else read_json(config)
    generation = folder / "generation_config.json"
    if "pyseq" not in raw and generation.is_file():  # transformers lets it win over config.json
        raw = {**raw, **{k: v for k, v in read_json(generation).items() if k.endswith("_token_id")}}
    model = build(raw, tensors, device=device, dtype=dtype)
    model.tokenizer = load_tokenizer(folder) or model.tokenizer or world_tokenizer(model.config.vocab_size)
    return model


def build(raw: dict[str, Any], tensors: Tensors, *, device: Any = None, dtype: torch.dtype | None = None) -> CausalLM:
    """The model that a config.json of any layout and its tensors make. Names, shapes and types are checked first."""
    tensors, names = layouts.under_our_names(tensors)
    config = layouts.read_config(raw, tensors, names)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = dict(model.named_parameters())
    if config.tie_embeddings:
        names.pop(layouts.HEAD, None)
    for name in sorted(set(expected) - set(names)):
        raise ValueError(f"checkpoint: tensor {name!r} is missing")
    for name in sorted(set(names) - set(expected)):
        raise ValueError(f"checkpoint: unexpected tensor {names[name]!r}")
    for name, parameter in expected.items():
        if tensors.shape(names[name]) != list(parameter.shape):
            got, want = tensors.shape(names[name]), list(parameter.shape)
            raise ValueError(f"checkpoint: {names[name]} has shape {got}, expected {want}")
    kind = dtype or tensors.dtype(next(names[name] for name in layouts.TYPED if name in expected))
    for name in expected:
        tensors.dtype(names[name])  # raises for anything but floats
    model.to(kind)  # on the meta device: decides each parameter's type, and keeps the exact ones in float32
    with torch.no_grad():
        loaded = {
            name: tensors.read(names[name]).to(device or "cpu", parameter.dtype)
            for name, parameter in model.named_parameters()
        }
    flags = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
    model.load_state_dict(loaded, assign=True)
    for name, parameter in model.named_parameters():
        vars(parameter).update(flags[name])
        parameter.requires_grad_(True)
    return model.eval()


def save_pretrained(model: CausalLM, path: str | os.PathLike[str]) -> None:
    """See `CausalLM.save_pretrained`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**layouts.transformers_config(model.config), "pyseq": model.config.to_dict()}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    raw["dtype"] = str(tensors[layouts.EMBEDDING].dtype).removeprefix("torch.")
    with replacing(folder / WEIGHTS, folder / CONFIG) as (weights, config):
        save_file(tensors, weights, {"format": "pt"})
        config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _find(path: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """The folder and the weight files that `path` names."""
    where = Path(path)
    if where.is_file():
        if where.suffix in PICKLES:
            raise _pickle(where)
        if where.name.endswith(".index.json"):
            return where.parent, shards(where)
        if where.suffix != ".safetensors":
            raise ValueError(f"path: {where} is not a .safetensors file")
        return where.parent, [where]
    if not where.exists():
        if not HUB_ID.fullmatch(str(path)) or str(path).startswith("."):
            raise FileNotFoundError(f"path: {where} is not there, and is not a Hub id like owner/name")
        where = _download(str(path))
    if (where / WEIGHTS).is_file():
        return where, [where / WEIGHTS]
    if (where / INDEX).is_file():
        return where, shards(where / INDEX)
    found = sorted(where.glob("*.safetensors"))
    if len(found) == 1:
        return where, found
    pickles = sorted(file for file in where.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise _pickle(pickles[0])
    if found:
        raise ValueError(f"path: {where} holds several .safetensors files and no {INDEX}; name one file")
    raise FileNotFoundError(
        f"path: no {WEIGHTS} in {where}. If it holds a pickle (pytorch_model.bin), fetch that and run `pyseq convert`"
    )


def _download(name: str) -> Path:
    """Weights in Mistral's layout only where there are no others: they would be the same ones again."""
    where = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=[MISTRAL]))
    if not any(where.glob("*.safetensors")):
        where = Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    return where


def _config_beside(folder: Path, weights: Path) -> Path | None:
    """config.json, or params.json, where Mistral's layout has what the other has in its."""
    known = (PARAMS, CONFIG) if weights.match(MISTRAL) else (CONFIG, PARAMS)
    for name in known:
        if (folder / name).is_file():
            return folder / name
    return None


def _pickle(path: Path) -> ValueError:
    return ValueError(
        f"path: {path} is a pickle, which can run code when read. `pyseq convert {path} FOLDER` makes it safetensors"
    )


__all__ = ["Config", "build", "from_pretrained", "save_pretrained"]
