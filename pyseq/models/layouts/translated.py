"""A checkpoint whose tensors are ours under other names and in other shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pyseq.models.files import Tensors


class Source(NamedTuple):
    """Where a tensor of ours comes from. `how`: "same"; "flat", a vector with axes of size 1 before it; "transpose";
    "heads", [H, N], flat in some files (N = `size`); "rows", one row from each of `files`; "rows in one", [R, D].
    """

    files: tuple[str, ...]
    how: str = "same"
    size: int = 64


class Translated:
    """The interface of `pyseq.models.files.Tensors`, for what `sources` make of the tensors of a file.

    Shapes are those after translation, and are known before a tensor is read. A shape that cannot be translated stays
    as it is, to be refused where it is compared.
    """

    def __init__(self, tensors: Tensors, sources: dict[str, Source]) -> None:
        self._tensors = tensors
        self._sources = sources

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> list[int]:
        files, how, size = self._sources[name]
        found = self._tensors.shape(files[0])
        if how == "transpose":
            return found[::-1]
        if how == "flat":
            return _flat(found)
        if how == "heads" and len(_flat(found)) == 1:
            rows = _flat(found)[0]
            return [rows // size, size] if rows % size == 0 else found
        if how == "rows in one":
            return [found[0], math.prod(found[1:])] if found else found
        if how == "rows":
            vectors = [_flat(self._tensors.shape(file)) for file in files]
            return [len(files), *vectors[0]] if all(vector == vectors[0] for vector in vectors) else found
        return found

    def dtype(self, name: str) -> torch.dtype:
        kinds = [self._tensors.dtype(file) for file in self._sources[name].files]
        return kinds[0]

    def read(self, name: str) -> torch.Tensor:
        files, how, _ = self._sources[name]
        parts = [self._tensors.read(file) for file in files]
        if how == "transpose":
            return parts[0].t().contiguous()
        return (torch.stack([part.flatten() for part in parts]) if how == "rows" else parts[0]).view(self.shape(name))


def _flat(shape: list[int]) -> list[int]:
    return [shape[-1]] if shape and math.prod(shape[:-1]) == 1 else shape
