"""Inputs of ssd: ragged and aligned widths, groups, every option, packed sequences, chunks cut anywhere."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int,
    time: int,
    heads: int,
    width: int,
    states: int,
    groups: int = 1,
    *,
    options: str = "",
    packed: list[int] | None = None,
    **given: Any,
) -> Make:
    """`options` names the optional arguments to draw; "D" is one per head, "DP" one per channel."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        softplus = given.get("dt_softplus")
        arguments: dict[str, Any] = {
            "x": normal(batch, time, heads, width),
            "dt": normal(batch, time, heads) if softplus else 0.1 + 0.1 * normal(batch, time, heads).abs(),
            "A": -torch.linspace(0.3, 4, heads, dtype=torch.float64) * (1 + 0.1 * normal(heads).abs()),
            "B": normal(batch, time, groups, states),
            "C": normal(batch, time, groups, states),
        }
        sequences = batch if packed is None else len(packed) - 1
        optional = {
            "D": normal(heads), "DP": normal(heads, width), "z": normal(batch, time, heads, width),
            "dt_bias": normal(heads) - 2, "state": normal(sequences, heads, width, states),
        }  # fmt: skip
        arguments |= {"D" if name == "DP" else name: optional[name] for name in options.split()}
        if packed is not None:
            arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
        return arguments | given

    return make


def samples() -> list[Sample]:
    everything = "D z dt_bias state"
    full: dict[str, Any] = {"options": everything, "dt_softplus": True, "return_state": True}
    cases: dict[str, Make] = {
        "plain": _make(2, 3, 2, 2, 2),
        "all": _make(2, 4, 2, 3, 3, **full),
        "one": _make(1, 1, 1, 1, 1, options="D z", dt_softplus=True),
        "groups": _make(1, 3, 6, 2, 2, 3, options="z dt_bias", dt_softplus=True),
        "a_group_per_head": _make(2, 2, 3, 2, 2, 3, options="DP state"),
        "limits": _make(1, 4, 3, 2, 2, options="dt_bias", dt_softplus=True, dt_limit=(0.1, 0.2)),
        "packed": _make(1, 7, 2, 2, 2, packed=[0, 3, 3, 7], **full),
        "empty": _make(2, 0, 5, 3, 2, options=everything, return_state=True),
        "wide_chunks": _make(2, 150, 3, 20, 24, **full),
        "wide_aligned": _make(1, 130, 4, 64, 128, options="D", dt_softplus=True),
        "wide_gated": _make(1, 70, 4, 64, 128, **full),
        "wide_groups": _make(1, 66, 6, 33, 17, 2, **full | {"options": "DP z dt_bias state"}),
        "wide_states": _make(1, 20, 2, 5, 260, options="state", return_state=True),
        "wide_heads": _make(1, 18, 2, 128, 16, options="state", return_state=True, dt_limit=(0.05, 0.15)),
        "wide_long": _make(1, 530, 2, 8, 8, options="state", return_state=True),
        "wide_packed": _make(1, 200, 2, 18, 40, packed=[0, 0, 63, 64, 65, 65, 199, 200, 200], **full),
        "wide_packed_aligned": _make(1, 100, 2, 64, 64, packed=[0, 3, 70, 70, 100], **full),
    }
    return [Sample("ssd", name, make, not name.startswith("wide")) for name, make in cases.items()]
