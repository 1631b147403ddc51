"""Arguments that several functions of this package take."""

from __future__ import annotations

from typing import Any

import torch


def check_ids(ids: Any, rows: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"input_ids must be an int32 or int64 tensor, got {kind}")
    if ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, T], got {list(ids.shape)}")
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"input_ids must lie in [0, {rows}), got {low} to {high}")


def check_mask(mask: Any, ids: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}, got {got}")
    keep = mask.bool()
    if mask.is_floating_point() or bool((keep[:, :-1] & ~keep[:, 1:]).any()) or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must be 0 on the left of a row and 1 after it (left padding)")
