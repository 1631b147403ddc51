"""Inputs of selective_scan: ragged widths, groups, every option, packed sequences, checkpoints in the middle."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int,
    time: int,
    dim: int,
    states: int,
    *,
    groups: int = 0,
    options: str = "",
    packed: list[int] | None = None,
    **given: Any,
) -> Make:
    """`options` names the optional arguments to draw; groups = 0 leaves out the axis G."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        shared = (batch, time, groups, states) if groups else (batch, time, states)
        arguments: dict[str, Any] = {
            "u": normal(batch, time, dim),
            "dt": normal(batch, time, dim) if given.get("dt_softplus") else 0.1 + 0.1 * normal(batch, time, dim).abs(),
            "A": -torch.arange(1, states + 1, dtype=torch.float64) * (1 + 0.1 * normal(dim, states)),
            "B": normal(*shared),
            "C": normal(*shared),
        }
        sequences = batch if packed is None else len(packed) - 1
        optional = {
            "D": normal(dim), "z": normal(batch, time, dim), "dt_bias": normal(dim) - 2,
            "state": normal(sequences, dim, states),
        }
        arguments |= {name: optional[name] for name in options.split()}
        if packed is not None:
            arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
        return arguments | given

    return make


def samples() -> list[Sample]:
    everything = "D z dt_bias state"
    cases: dict[str, Make] = {
        "plain": _make(2, 3, 4, 2),
        "all": _make(2, 4, 3, 3, options=everything, dt_softplus=True, return_state=True),
        "one": _make(1, 1, 1, 1, options="D z", dt_softplus=True),
        "groups": _make(1, 3, 6, 2, groups=3, options="z dt_bias", dt_softplus=True),
        "a_group_per_channel": _make(2, 2, 3, 2, groups=3, options="state"),
        "packed": _make(1, 7, 2, 2, packed=[0, 3, 3, 7], options=everything, dt_softplus=True, return_state=True),
        "empty": _make(2, 0, 5, 3, options=everything, return_state=True),
        "wide_chunks": _make(2, 150, 20, 16, options=everything, dt_softplus=True, return_state=True),
        "wide_tiles": _make(1, 66, 150, 16, options="D z dt_bias", dt_softplus=True),
        "wide_groups": _make(2, 70, 42, 17, groups=2, options=everything, dt_softplus=True, return_state=True),
        "wide_states": _make(1, 20, 5, 260, options="state", return_state=True),
        "wide_packed": _make(
            1, 200, 18, 40, groups=1, packed=[0, 0, 63, 64, 65, 65, 199, 200, 200], options=everything,
            dt_softplus=True, return_state=True,
        ),
        "wide_cut_in_time": _make(   # by GPU kernels, from 512 tokens on
            1, 520, 6, 3, packed=[0, 130, 130, 520], options=everything, dt_softplus=True, return_state=True,
        ),
    }
    return [Sample("selective_scan", name, make, not name.startswith("wide")) for name, make in cases.items()]
