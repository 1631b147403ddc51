"""Any checkpoint to this package's layout; pickled ones (.bin, .pt, .pth) without running anything that is in them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from pyseq.models.files import FLOATS, read_json
from pyseq.models.layouts import needs_config
from pyseq.models.pretrained import CONFIG, PICKLES, build, from_pretrained
from pyseq.models.text import load_tokenizer
from pyseq.models.world import world_tokenizer


def convert_checkpoint(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Reads the checkpoint `src`, pickled or not, and writes this package's layout to the folder `dst`.

    `src` is a folder, or a file with its config.json beside it; an RWKV-7 (.pth) needs none. Pickles go through
    `torch.load(weights_only=True)`, which reads tensors and refuses everything else.
    """
    source = Path(src)
    if source.suffix == ".safetensors" or (source.is_dir() and any(source.glob("*.safetensors"))):
        return from_pretrained(source).save_pretrained(dst)
    files = [source] if source.is_file() else _pickles(source)
    folder = source.parent if source.is_file() else source
    alone = not (folder / CONFIG).is_file()
    if alone and files[0].suffix != ".pth":
        raise _no_config(folder)
    if alone and len(files) > 1:
        raise FileNotFoundError(f"src: {folder} holds several checkpoints and no {CONFIG}; name one file")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(_load(file))
    loaded = LoadedTensors(tensors)
    if alone and needs_config(loaded):
        raise _no_config(folder)
    model = build({} if alone else read_json(folder / CONFIG), loaded)
    model.tokenizer = load_tokenizer(folder) or model.tokenizer or world_tokenizer(model.config.vocab_size)
    model.save_pretrained(dst)


def _no_config(folder: Path) -> FileNotFoundError:
    return FileNotFoundError(f"src: no {CONFIG} in {folder}; a checkpoint needs the one it was published with")


class LoadedTensors:
    """A dictionary of tensors behind the interface of `pyseq.models.files.Tensors`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in FLOATS.values():
            raise ValueError(f"checkpoint: {name} is {dtype}, expected a floating-point type")
        return dtype

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().clone()


def _pickles(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"src: {folder} is not there")
    found = sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    if not found:
        raise FileNotFoundError(f"src: no {', '.join(PICKLES)} file in {folder}")
    return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"src: {path} is not a checkpoint of plain tensors: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise ValueError(f"src: {path} holds {type(value).__name__}, expected a dictionary of tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"src: {path}: {name!r} is {type(tensor).__name__}, expected a tensor")
    return value
