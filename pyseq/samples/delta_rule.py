"""Inputs of delta_rule: every case that the arguments choose, ragged widths, decays weak, strong and total, packing."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int,
    time: int,
    heads: int,
    keys: int,
    values: int,
    *,
    gate: str = "",
    correct: bool = True,
    state: bool = False,
    packed: list[int] | None = None,
    **given: Any,
) -> Make:
    """`gate`: "" none, "head" one decay per head, "key" one per key channel, "strong" the same down to exp(-40), with
    some keys forgotten at once. Corrections are RWKV-7's: along a unit vector, by a share from 0 to 1."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        rows = (batch, time, heads)
        unit = torch.nn.functional.normalize(normal(*rows, keys), dim=-1)
        share = torch.sigmoid(normal(*rows, keys))
        weak = -0.6065 * torch.sigmoid(normal(*rows, keys))
        strong = torch.where(normal(*rows, keys) > 1, -torch.inf, -40 * torch.sigmoid(4 * normal(*rows, keys)))
        gates = {"": None, "head": weak[..., 0], "key": weak, "strong": strong}
        arguments: dict[str, Any] = {
            "q": normal(*rows, keys), "k": normal(*rows, keys) * keys**-0.5, "v": normal(*rows, values),
            "a": -unit if correct else None, "b": unit * share if correct else None, "g": gates[gate],
        }  # fmt: skip
        if state:
            sequences = batch if packed is None else len(packed) - 1
            arguments["state"] = normal(sequences, heads, keys, values)
        if packed is not None:
            arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
        return arguments | given

    return make


def samples() -> list[Sample]:
    full: dict[str, Any] = {"gate": "key", "state": True, "return_state": True}
    ends = [0, 0, 63, 64, 65, 65, 149, 150, 150]
    cases: dict[str, Make] = {
        "plain": _make(2, 4, 2, 3, 2),
        "all": _make(2, 5, 2, 3, 4, scale=0.5, **full),
        "one": _make(1, 1, 1, 1, 1, gate="key"),
        "linear": _make(1, 5, 2, 2, 3, correct=False, state=True, return_state=True),
        "retention": _make(1, 4, 2, 3, 2, gate="head", correct=False, scale=0.7),
        "head": _make(2, 4, 1, 2, 2, gate="head", state=True, return_state=True),
        "packed": _make(1, 7, 2, 3, 2, packed=[0, 3, 3, 7], **full),
        "empty": _make(2, 0, 3, 4, 2, **full),
        "wide_rwkv7": _make(1, 70, 2, 64, 64, **full),
        "wide_ragged": _make(2, 83, 1, 20, 9, **full),
        "wide_gla": _make(1, 66, 2, 33, 24, correct=False, **full),
        "wide_retention": _make(1, 68, 1, 40, 48, correct=False, gate="head", state=True, return_state=True),
        "wide_linear": _make(1, 40, 1, 16, 64, correct=False),
        "wide_scalar": _make(1, 67, 1, 64, 32, gate="head", state=True, return_state=True),
        "wide_undecayed": _make(1, 50, 1, 32, 64, state=True, return_state=True),
        "wide_strong": _make(1, 66, 2, 24, 32, gate="strong", state=True, return_state=True),
        "wide_widest": _make(1, 18, 1, 256, 256, **full),
        "wide_packed": _make(1, 150, 1, 32, 40, packed=ends, **full),
    }
    return [Sample("delta_rule", name, make, not name.startswith("wide")) for name, make in cases.items()]
