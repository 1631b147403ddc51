"""Safetensors and JSON files from strangers: shapes are known before a tensor is read, and writes are atomic."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import save_file

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_JSON = 64 << 20  # bytes


class Tensors(Protocol):
    """Named tensors whose shapes and types can be asked before they are read."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> list[int]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> torch.Tensor: ...


class TensorFile:
    """One safetensors file, mapped into memory. `read` copies, so that the file may change or go afterwards."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{self.path}: not a safetensors file, or cut short: header of {length} bytes in {size}")
        try:
            # The library checks the header: bounds, overlaps, gaps, and that shapes match lengths.
            self._file = safetensors.safe_open(self.path, framework="pt")
            self._names = list(self._file.keys())
        except (safetensors.SafetensorError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: not a valid safetensors file: {error}") from error
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slices.clear()
        del self._file

    def metadata(self) -> dict[str, str]:
        return dict(self._file.metadata() or {})

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> list[int]:
        return list(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._slice(name).get_dtype()
        if kind not in FLOATS:
            raise ValueError(f"{self.path}: {name} is {kind}, expected one of {', '.join(FLOATS)}")
        return FLOATS[kind]

    def read(self, name: str) -> torch.Tensor:
        self.dtype(name)
        return self._file.get_tensor(name).clone()

    def _slice(self, name: str) -> Any:
        if name not in self._slices:
            self._slices[name] = self._file.get_slice(name)
        return self._slices[name]


class TensorFiles:
    """Several safetensors files read as one."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[str, TensorFile] = {}
        for path in paths:
            file = TensorFile(path)
            for name in file.names():
                if name in self._files:
                    raise ValueError(f"{path}: {name} is also in {self._files[name].path.name}")
                self._files[name] = file

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> list[int]:
        return self._files[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._files[name].dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].read(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of moderate size. `Infinity` and `NaN`, which checkpoints contain, are accepted."""
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes is too long for a JSON file, at most {MAX_JSON}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def shards(index: Path) -> list[Path]:
    """The files that an index.json names. They lie beside it: a name with a folder in it is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    paths = []
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} must be the plain name of a .safetensors file in the same folder")
        path = index.parent / name
        if not path.is_file():
            raise ValueError(f"{index}: {name!r} is missing")
        paths.append(path)
    return paths


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    with replacing(Path(path)) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[Any]:
    """Yields a temporary path for each path; at the end they take the paths' places. On any error nothing changes."""
    temporaries = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    try:
        yield temporaries[0] if len(paths) == 1 else temporaries
        for temporary in temporaries:
            _sync(temporary)
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
        _sync(paths[0].parent)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
