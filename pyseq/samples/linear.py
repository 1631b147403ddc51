"""Inputs of linear: one row, few rows, many rows; widths around the panel of 32 and the chunk of 256."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(leading: tuple[int, ...], features: tuple[int, int], *, bias: bool = True) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        inputs, outputs = features
        arguments = {"x": normal(*leading, inputs), "weight": normal(outputs, inputs) / inputs**0.5}
        return arguments | ({"bias": normal(outputs)} if bias else {})

    return make


def samples() -> list[Sample]:
    cases: dict[str, Make] = {
        "plain": _make((2, 3), (5, 4)),
        "no_bias": _make((3,), (4, 6), bias=False),
        "one_row": _make((), (7, 5)),
        "one_by_one": _make((2,), (1, 1)),
        "no_rows": _make((2, 0), (5, 3)),
        "four_axes": _make((2, 1, 3), (3, 2)),
        "wide_one_row": _make((1,), (600, 129)),
        "wide_two_rows": _make((2,), (257, 300)),
        "wide_seven_rows": _make((7,), (65, 64)),
        "wide_seventeen_rows": _make((17,), (129, 67)),
        "wide_many_rows": _make((3, 150), (77, 97)),
    }
    return [Sample("linear", name, make, not name.startswith("wide")) for name, make in cases.items()]
