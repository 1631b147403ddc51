"""Inputs of rms_norm_gated: ragged widths, groups, the gate on either side, a residual."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(shape: tuple[int, ...], *, z: bool = False, residual: bool = False, **options: Any) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        arguments: dict[str, Any] = {"x": normal(*shape), "weight": 1 + 0.1 * normal(shape[-1])}
        if z:
            arguments["z"] = normal(*shape)
        if residual:
            arguments["residual"] = normal(*shape)
        return arguments | options

    return make


def samples() -> list[Sample]:
    cases: dict[str, Make] = {
        "plain": _make((3, 5, 8)),
        "one_channel": _make((4, 1), eps=0.5),   # with a small eps the gradient would be all cancellation
        "one_row": _make((33,), z=True),
        "gated": _make((2, 4, 6), z=True),
        "gated_groups": _make((2, 3, 12), z=True, group_size=4, eps=1e-3),
        "norm_first": _make((2, 3, 12), z=True, group_size=6, norm_before_gate=True),
        "residual": _make((2, 3, 7), residual=True),
        "residual_gated": _make((2, 2, 5), z=True, residual=True),
        "four_axes": _make((2, 2, 3, 5), z=True, residual=True, norm_before_gate=True),
        "no_rows": _make((2, 0, 8), z=True, residual=True),
        "wide": _make((2, 19, 1537), z=True, residual=True),
        "wide_groups": _make((70, 1024), z=True, group_size=64),
    }
    return [Sample("rms_norm_gated", name, make, not name.startswith("wide")) for name, make in cases.items()]
