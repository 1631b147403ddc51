"""RWKV's token shift: what each token of a sequence has before it."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def token_shift(x: Tensor, last: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """before[t] = x[t-1], and x[-1] = last at the start of a sequence; returns (before, x at the last token).

    x [B, T, D]; last [B, D], None is zeros. Packed by cu_seqlens [S + 1]: batch 1, last [S, D]; an empty sequence hands
    on what it got. Values of cu_seqlens are not read: wrong ones give wrong rows, and no access out of bounds.
    """
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if last is None:
        last = x.new_zeros(sequences, x.shape[-1])
    if x.shape[1] == 0:
        return x, last.clone()
    if cu_seqlens is None:
        first = last.to(x.dtype)
        return torch.cat([first[:, None], x[:, :-1]], 1), x[:, -1].clone()
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    position = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(end, position, right=True).clamp(max=sequences - 1)
    starts = (position == begin[sequence])[:, None]
    before = torch.where(starts, last.to(x.dtype)[sequence], x[0].roll(1, 0))
    after = torch.where((end > begin)[:, None], x[0, (end - 1).clamp(0, x.shape[1] - 1)], last)
    return before[None], after
