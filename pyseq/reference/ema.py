"""Exponential moving average: y[t] = p[t] x[t] + (1 - p[t]) y[t-1].

x [B, T, D]; p [B, T]; state [B, D], y before the first token; packed by cu_seqlens [S + 1]: batch 1, states [S, D].
"""

from itertools import pairwise

import torch


def _wide(x, p, state):
    width = torch.float64 if torch.float64 in (x.dtype, p.dtype) else torch.float32
    return [None if t is None else t.to(width) for t in (x, p, state)]


def ema(x, p, *, state=None, cu_seqlens=None, return_state=False):
    """Returns y [B, T, D] in x's dtype, or (y, state)."""
    dtype = x.dtype
    x, p, state = _wide(x, p, state)
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [x[:, :0]], []
    for s, (begin, end) in enumerate(pairwise(ends)):
        y = x.new_zeros(x.shape[0], x.shape[2])
        if state is not None:
            y = state.clone() if cu_seqlens is None else state[s : s + 1]
        for t in range(begin, end):
            y = p[:, t, None] * x[:, t] + (1 - p[:, t, None]) * y
            ys.append(y[:, None])
        states.append(y)
    y = torch.cat(ys, 1).to(dtype)
    return (y, torch.cat(states)) if return_state else y


def ema_step(state, x, p):
    """x [B, D]; p [B]. Updates state [B, D] in place and returns y [B, D]."""
    dtype = x.dtype
    x, p, y = _wide(x, p, state)
    y = p[:, None] * x + (1 - p[:, None]) * y
    state.copy_(y)
    return y.to(dtype)
