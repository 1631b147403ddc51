"""Inputs of every op, for the shared tests, `pyseq verify` and opcheck: one module per op with a function samples()."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Make = Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """Arguments by name. `make` draws them in float64; `cast` gives the floats among them a dtype."""

    op: str
    name: str
    make: Make
    small: bool = False   # small enough for gradcheck of the reference

    def draw(self, seed: int = 0) -> dict[str, Any]:
        return self.make(torch.Generator().manual_seed(seed))

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def samples(op: str) -> list[Sample]:
    made: list[Sample] = importlib.import_module(f"{__name__}.{op}").samples()
    return made


def cast(arguments: dict[str, Any], dtype: torch.dtype, float32: tuple[str, ...]) -> dict[str, Any]:
    """Data in `dtype`; the arguments named in `float32`, and every state, in float32 (but all float64 for float64)."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one(name, v) for v in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        wide = dtype == torch.float64 or not (name.endswith("state") or name in float32)
        return value.to(dtype if wide else torch.float32)

    return {name: one(name, value) for name, value in arguments.items()}
