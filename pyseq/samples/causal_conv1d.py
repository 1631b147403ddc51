"""Inputs of causal_conv1d: widths 1 to 9, ragged channels and whole vectors of them, sequences shorter than the window,
states, packing."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    shape: tuple[int, int, int],
    width: int,
    *,
    bias: bool = False,
    state: bool = False,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> Make:
    batch, _, channels = shape

    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        arguments: dict[str, Any] = {"x": normal(*shape), "weight": normal(channels, width)}
        if bias:
            arguments["bias"] = normal(channels)
        if state:
            arguments["state"] = normal(batch if lengths is None else len(lengths), channels, width - 1)
        if lengths is not None:
            arguments["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return arguments | options

    return make


def samples() -> list[Sample]:
    silu: dict[str, Any] = {"activation": "silu", "return_state": True}
    cases: dict[str, Make] = {
        "plain": _make((2, 6, 5), 4),
        "one_channel": _make((2, 9, 1), 3, bias=True, activation="silu"),
        "all": _make((2, 7, 7), 4, bias=True, state=True, **silu),
        "width_1": _make((2, 5, 3), 1, bias=True, **silu),
        "width_2": _make((2, 5, 7), 2, bias=True, state=True, **silu),
        "width_3": _make((1, 12, 4), 3, state=True, **silu),
        "width_5": _make((2, 7, 3), 5, bias=True, state=True, **silu),
        "shorter_than_window": _make((2, 2, 5), 4, bias=True, state=True, **silu),
        "far_shorter_than_window": _make((1, 3, 2), 9, state=True, **silu),
        "no_time": _make((2, 0, 6), 4, bias=True, state=True, **silu),
        "no_time_width_9": _make((2, 0, 6), 9, bias=True, state=True, **silu),
        "packed": _make((1, 12, 3), 4, bias=True, state=True, lengths=(5, 0, 1, 6, 0), **silu),
        "packed_without_state": _make((1, 9, 2), 3, lengths=(0, 2, 7), activation="silu"),
        "wide": _make((2, 150, 533), 4, bias=True, state=True, **silu),
        "wide_vectors": _make((2, 45, 40), 4, bias=True, state=True, **silu),
        "wide_packed_vectors": _make((1, 70, 16), 3, bias=True, state=True, lengths=(17, 0, 1, 41, 2, 9), **silu),
        "wide_width_9": _make((1, 137, 33), 9, bias=True, state=True, lengths=(70, 0, 3, 64), **silu),
    }
    return [Sample("causal_conv1d", name, make, not name.startswith("wide")) for name, make in cases.items()]
