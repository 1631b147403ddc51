"""Inputs of ema: ragged and aligned widths, packed sequences, weights near 0 and 1, chunks cut anywhere."""

from __future__ import annotations

from typing import Any

import torch

from . import Make, Sample


def _make(
    batch: int, time: int, dim: int, *, state: bool = False, packed: list[int] | None = None, **given: Any
) -> Make:
    def make(generator: torch.Generator) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        # As H-Net clamps it: the first token takes all but nothing of what was before, others almost nothing of x.
        p = (3 * normal(batch, time) - 1).sigmoid()
        p[:, :1] = 1
        arguments: dict[str, Any] = {"x": normal(batch, time, dim), "p": p.clamp(1e-4, 1 - 1e-4)}
        if state:
            arguments["state"] = normal(batch if packed is None else len(packed) - 1, dim)
        if packed is not None:
            arguments["cu_seqlens"] = torch.tensor(packed, dtype=torch.int32)
        return arguments | given

    return make


def samples() -> list[Sample]:
    full: dict[str, Any] = {"state": True, "return_state": True}
    cases: dict[str, Make] = {
        "plain": _make(2, 3, 4),
        "all": _make(2, 5, 3, **full),
        "one": _make(1, 1, 1, state=True),
        "packed": _make(1, 7, 2, packed=[0, 3, 3, 7], **full),
        "empty": _make(2, 0, 5, **full),
        "wide_aligned": _make(2, 150, 256, **full),
        "wide_ragged": _make(2, 270, 133, **full),
        "wide_narrow": _make(3, 41, 5, return_state=True),
        "wide_packed": _make(1, 200, 70, packed=[0, 0, 15, 16, 17, 17, 48, 199, 200, 200], **full),
        "wide_packed_aligned": _make(1, 300, 64, packed=[0, 128, 129, 256, 300], **full),
    }
    return [Sample("ema", name, make, not name.startswith("wide")) for name, make in cases.items()]
