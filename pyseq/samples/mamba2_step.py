"""Inputs of mamba2_step: ragged widths and states, groups, the norm on either side of the gate, limits, no gate."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int, heads: int, width: int, states: int, groups: int = 1, taps: int = 4, *, norm: bool = False,
    gate: bool = True, conv_bias: bool = True, D_wide: bool = False, **options: Any,
) -> Make:  # fmt: skip
    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        inner = heads * width
        channels = inner + 2 * groups * states
        arguments: dict[str, Any] = {
            "conv_state": normal(batch, channels, taps - 1),
            "state": normal(batch, heads, width, states),
            "z": normal(batch, inner) if gate else None,
            "xBC": normal(batch, channels),
            "dt": normal(batch, heads),
            "conv_weight": normal(channels, taps),
            "conv_bias": normal(channels) if conv_bias else None,
            "A": -torch.linspace(0.3, 4, heads, dtype=torch.float64) * (1 + 0.1 * normal(heads).abs()),
            "D": normal(heads, width) if D_wide else normal(heads),
            "dt_bias": normal(heads) - 2,
            "norm_weight": 1 + 0.1 * normal(inner) if norm else None,
        }
        return arguments | options

    return make


def samples() -> list[Sample]:
    cases: dict[str, Make] = {
        "plain": _make(2, 2, 3, 4),
        "one": _make(1, 1, 1, 1, taps=1, conv_bias=False, D=torch.ones(1, dtype=torch.float64)),
        "normed": _make(2, 4, 5, 2, 2, norm=True, group_size=10, eps=0.1),
        "norm_first": _make(2, 2, 4, 3, norm=True, norm_before_gate=True),
        "no_gate": _make(2, 2, 2, 3, gate=False, norm=True, conv_bias=False),
        "limits": _make(2, 3, 2, 2, 3, 2, D_wide=True, dt_limit=(0.1, 0.2)),
        "width_6": _make(1, 2, 2, 3, taps=6, norm=True),
        "no_rows": _make(0, 2, 3, 4, norm=True),
        "wide": _make(3, 4, 64, 128, 2, norm=True, group_size=128),
        "wide_ragged": _make(2, 3, 70, 17, D_wide=True, norm=True, norm_before_gate=True),
        "wide_states": _make(1, 2, 33, 300),
        "wide_half": _make(2, 2, 40, 50, norm=True),
        "wide_norm": _make(1, 2, 4500, 3, norm=True),
    }
    return [Sample("mamba2_step", name, make, not name.startswith("wide")) for name, make in cases.items()]
