"""Causal depthwise convolution: a[t] = bias + sum over k of weight[k] x[t - (W-1) + k]; y[t] = a[t] or silu(a[t]).

The W-1 samples before the first are the state, oldest first; the state returned holds the last W-1 samples.
"""

from itertools import pairwise

import torch
from torch.nn.functional import silu


def _sequence(x, weight, bias, activation, state):
    """One batch of sequences of equal length: x [B, T, D], state [B, D, W-1]."""
    T, W = x.shape[1], weight.shape[1]
    samples = torch.cat([state.transpose(1, 2), x], 1)   # [B, W-1 + T, D]
    a = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(W):
        a = a + weight[:, k] * samples[:, k : k + T]
    return silu(a) if activation == "silu" else a, samples[:, T:].transpose(1, 2)


def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, cu_seqlens=None, return_state=False):
    """x [B, T, D]; weight [D, W]; bias [D]; state [B, D, W-1], or [S, D, W-1] with cu_seqlens [S + 1] and B = 1."""
    double = x.dtype == torch.float64 or (state is not None and state.dtype == torch.float64)
    wide = torch.float64 if double else torch.float32
    samples, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        state = samples.new_zeros(sequences, x.shape[2], weight.shape[1] - 1)
    state = state.to(wide)
    if cu_seqlens is None:
        y, last = _sequence(samples, weight, bias, activation, state)
    else:
        parts = [
            _sequence(samples[:, begin:end], weight, bias, activation, state[s : s + 1])
            for s, (begin, end) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        y, last = torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts])
    y = y.to(x.dtype)
    return (y, last.clone(memory_format=torch.contiguous_format)) if return_state else y


def causal_conv1d_step(state, x, weight, bias=None, *, activation=None):
    """One token, x [B, D]; state [B, D, W-1] is updated in place."""
    y, last = causal_conv1d(x[:, None], weight, bias, activation=activation, state=state, return_state=True)
    state.copy_(last)
    return y[:, 0]
