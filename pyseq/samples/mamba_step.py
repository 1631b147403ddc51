"""Inputs of mamba_step: ragged widths, ranks and states, more rows than one block takes, FalconMamba's norms."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int, dim: int, states: int, rank: int, width: int = 4, *, conv_bias: bool = True, **options: Any
) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        arguments: dict[str, Any] = {
            "conv_state": normal(batch, dim, width - 1),
            "state": normal(batch, dim, states),
            "x": normal(batch, dim),
            "z": normal(batch, dim),
            "conv_weight": normal(dim, width),
            "conv_bias": normal(dim) if conv_bias else None,
            "x_proj_weight": normal(rank + 2 * states, dim) / dim**0.5,
            "dt_proj_weight": normal(dim, rank) / rank**0.5,
            "dt_bias": normal(dim) - 2,
            "A": -torch.arange(1, states + 1, dtype=torch.float64) * (1 + 0.1 * normal(dim, states).abs()),
            "D": normal(dim),
        }
        return arguments | options

    return make


def samples() -> list[Sample]:
    cases: dict[str, Make] = {
        "plain": _make(2, 6, 3, 2),
        # With one channel and one state there is no largest value beside a y that cancels: D u has the sign of <C, h>.
        "one": _make(1, 1, 1, 1, width=1, conv_bias=False, D=torch.ones(1, dtype=torch.float64)),
        "falcon": _make(3, 5, 4, 3, width=3, rms_eps=1e-5),
        "width_2": _make(2, 7, 2, 1, width=2, conv_bias=False),
        "width_6": _make(1, 4, 5, 2, width=6),
        "no_rows": _make(0, 6, 3, 2),
        "wide": _make(5, 70, 16, 33),
        "wide_falcon": _make(2, 129, 16, 8, rms_eps=1e-6),
        "wide_chunks": _make(2, 1100, 4, 5),
        "wide_states": _make(1, 21, 40, 70),
        "wide_batch": _make(9, 64, 8, 8),
    }
    return [Sample("mamba_step", name, make, not name.startswith("wide")) for name, make in cases.items()]
