"""Generalised delta rule: S[t] = diag(exp(g[t])) S[t-1] + b[t] (S[t-1]^T a[t])^T + k[t] v[t]^T,
y[t] = scale S[t]^T q[t].

q, k, a, b [B, T, H, K]; g the same or [B, T, H]; v [B, T, H, V]; state [B, H, K, V]; packed by cu_seqlens [S + 1]:
batch 1, states [S, H, K, V].
"""

from itertools import pairwise

import torch


def _advance(S, scale, q, k, v, a, b, g):
    """One token: S [B, H, K, V]; q, k, a, b [B, H, K]; g the same or [B, H]; v [B, H, V]. Everything in S's dtype."""
    decayed = S
    if g is not None:
        decayed = torch.exp(g if g.dim() == 3 else g[..., None])[..., None] * S
    written = k[..., None] * v[:, :, None]
    if a is not None:
        written = written + b[..., None] * (S * a[..., None]).sum(2, keepdim=True)
    S = decayed + written
    return S, scale * (S * q[..., None]).sum(2)


def _wide(*tensors):
    *data, _ = tensors
    double = any(t is not None and t.dtype == torch.float64 for t in data)
    width = torch.float64 if double else torch.float32
    return [None if t is None else t.to(width) for t in tensors]


def _at(t, *tensors):
    return (None if x is None else x[:, t] for x in tensors)


def delta_rule(
    q, k, v, a, b, g, *, scale=1.0, state=None, cu_seqlens=None, return_state=False, exact=False
):
    """Returns y [B, T, H, V] in q's dtype, or (y, state). It is sequential whatever `exact` is."""
    dtype = q.dtype
    q, k, v, a, b, g, state = _wide(q, k, v, a, b, g, state)
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [v[:, :0]], []
    for s, (begin, end) in enumerate(pairwise(ends)):
        S = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
        if state is not None:
            S = state.clone() if cu_seqlens is None else state[s : s + 1]
        for t in range(begin, end):
            S, y = _advance(S, scale, *_at(t, q, k, v, a, b, g))
            ys.append(y[:, None])
        states.append(S)
    y = torch.cat(ys, 1).to(dtype)
    return (y, torch.cat(states)) if return_state else y


def delta_rule_step(state, q, k, v, a, b, g, *, scale=1.0):
    """q, k, a, b [B, H, K]; g the same or [B, H]; v [B, H, V]. Updates state in place and returns y [B, H, V]."""
    dtype = q.dtype
    q, k, v, a, b, g, S = _wide(q, k, v, a, b, g, state)
    S, y = _advance(S, scale, q, k, v, a, b, g)
    state.copy_(S)
    return y.to(dtype)


def rwkv7(r, w, k, v, a, b, *, scale=1.0, state=None, cu_seqlens=None, return_state=False, exact=False):
    """`delta_rule` with RWKV-7's letters: r reads, w is the log decay."""
    return delta_rule(
        r, k, v, a, b, w, scale=scale, state=state, cu_seqlens=cu_seqlens, return_state=return_state, exact=exact
    )


def rwkv7_step(state, r, w, k, v, a, b, *, scale=1.0):
    return delta_rule_step(state, r, k, v, a, b, w, scale=scale)


def gla(q, k, v, g, *, scale=None, state=None, cu_seqlens=None, return_state=False, exact=False):
    """`delta_rule` without a correction, scaled by K ** -0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return delta_rule(
        q, k, v, None, None, g, scale=scale, state=state, cu_seqlens=cu_seqlens, return_state=return_state, exact=exact
    )


def gla_step(state, q, k, v, g, *, scale=None):
    return delta_rule_step(state, q, k, v, None, None, g, scale=q.shape[-1] ** -0.5 if scale is None else scale)
