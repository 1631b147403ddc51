"""Gated delta rule: R[t] = diag(exp(g[t])) S[t-1], S[t] = R[t] + k[t] (beta[t] (v[t] - R[t]^T k[t]))^T,
y[t] = scale S[t]^T q[t].

q, k [B, T, H, K]; v [B, T, HV, V], head h of it reads q and k of head h // (HV / H); beta [B, T, HV]; g [B, T, HV],
[B, T, HV, K] or None; state [B, HV, K, V]; packed by cu_seqlens [S + 1]: batch 1, states [S, HV, K, V].
"""

from itertools import pairwise

import torch

from .delta_rule import _at, _wide


def _advance(S, scale, q, k, v, g, beta):
    """One token: S [B, HV, K, V]; q, k [B, H, K]; v [B, HV, V]; beta [B, HV]. Everything in S's dtype."""
    per_head = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(per_head, 1), k.repeat_interleave(per_head, 1)
    if g is not None:
        S = torch.exp(g if g.dim() == 3 else g[..., None])[..., None] * S
    u = beta[..., None] * (v - (S * k[..., None]).sum(2))
    S = S + k[..., None] * u[:, :, None]
    return S, scale * (S * q[..., None]).sum(2)


def gated_delta_rule(
    q, k, v, g, beta, *, scale=None, state=None, cu_seqlens=None, return_state=False, exact=False
):
    """Returns y [B, T, HV, V] in q's dtype, or (y, state). It is sequential whatever `exact` is."""
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta, state = _wide(q, k, v, g, beta, state)
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [v[:, :0]], []
    for s, (begin, end) in enumerate(pairwise(ends)):
        S = q.new_zeros(q.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
        if state is not None:
            S = state.clone() if cu_seqlens is None else state[s : s + 1]
        for t in range(begin, end):
            S, y = _advance(S, scale, *_at(t, q, k, v, g, beta))
            ys.append(y[:, None])
        states.append(S)
    y = torch.cat(ys, 1).to(dtype)
    return (y, torch.cat(states)) if return_state else y


def gated_delta_rule_step(state, q, k, v, g, beta, *, scale=None):
    """q, k [B, H, K]; v [B, HV, V]; beta [B, HV]. Updates state in place and returns y [B, HV, V]."""
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta, S = _wide(q, k, v, g, beta, state)
    S, y = _advance(S, scale, q, k, v, g, beta)
    state.copy_(S)
    return y.to(dtype)


kimi_delta_rule = gated_delta_rule             # g [B, T, HV, K]
kimi_delta_rule_step = gated_delta_rule_step   # g [B, HV, K]


def delta_net(q, k, v, beta, *, scale=None, state=None, cu_seqlens=None, return_state=False, exact=False):
    return gated_delta_rule(
        q, k, v, None, beta, scale=scale, state=state, cu_seqlens=cu_seqlens, return_state=return_state, exact=exact
    )


def delta_net_step(state, q, k, v, beta, *, scale=None):
    return gated_delta_rule_step(state, q, k, v, None, beta, scale=scale)
