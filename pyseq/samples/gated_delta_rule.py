"""Inputs of gated_delta_rule: one decay, one per key, none; shared keys, ragged widths, strong decays, packing."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int,
    time: int,
    heads: int,
    value_heads: int,
    keys: int,
    values: int,
    *,
    gate: str = "head",
    most: float = 1.0,
    state: bool = False,
    packed: list[int] | None = None,
    **given: Any,
) -> Make:
    """`gate`: "" none, "head" one decay per value head, "key" one per key channel, "strong" the same down to exp(-40),
    with some keys forgotten at once. Keys have unit length; beta is between 0 and `most`."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        rows = (batch, time, value_heads)
        weak = -torch.sigmoid(normal(*rows, keys) - 1)
        strong = torch.where(normal(*rows, keys) > 1, -torch.inf, -40 * torch.sigmoid(4 * normal(*rows, keys)))
        gates = {"": None, "head": weak[..., 0], "key": weak, "strong": strong}
        arguments: dict[str, Any] = {
            "q": torch.nn.functional.normalize(normal(batch, time, heads, keys), dim=-1),
            "k": torch.nn.functional.normalize(normal(batch, time, heads, keys), dim=-1),
            "v": normal(*rows, values), "g": gates[gate], "beta": most * torch.sigmoid(normal(*rows)),
        }  # fmt: skip
        if state:
            sequences = batch if packed is None else len(packed) - 1
            arguments["state"] = normal(sequences, value_heads, keys, values)
        if packed is not None:
            arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
        return arguments | given

    return make


def samples() -> list[Sample]:
    full: dict[str, Any] = {"state": True, "return_state": True}
    ends = [0, 0, 63, 64, 65, 65, 149, 150, 150]
    cases: dict[str, Make] = {
        "plain": _make(2, 4, 2, 2, 3, 2),
        "all": _make(2, 5, 2, 4, 3, 4, scale=0.5, **full),
        "one": _make(1, 1, 1, 1, 1, 1),
        "delta_net": _make(1, 5, 1, 2, 2, 3, gate="", **full),
        "kimi": _make(1, 4, 1, 2, 3, 2, gate="key", **full),
        "packed": _make(1, 7, 2, 2, 3, 2, packed=[0, 3, 3, 7], **full),
        "empty": _make(2, 0, 1, 3, 4, 2, **full),
        "wide_gated": _make(1, 70, 1, 2, 128, 128, **full),
        "wide_ragged": _make(2, 83, 1, 1, 20, 9, **full),
        "wide_kimi": _make(1, 66, 1, 2, 64, 48, gate="key", **full),
        "wide_delta_net": _make(1, 68, 2, 2, 40, 32, gate="", **full),
        "wide_negative": _make(1, 67, 1, 1, 32, 64, most=2.0, **full),
        "wide_strong": _make(1, 66, 2, 2, 24, 32, gate="strong", **full),
        "wide_widest": _make(1, 18, 1, 1, 256, 256, gate="key", **full),
        "wide_packed": _make(1, 150, 1, 2, 32, 40, packed=ends, **full),
    }
    return [Sample("gated_delta_rule", name, make, not name.startswith("wide")) for name, make in cases.items()]
