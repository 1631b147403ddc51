"""State-space dual: S[t] = exp(delta[t] A) S[t-1] + delta[t] x[t] B[t]^T, y[t] = (S[t] C[t] + D x[t]) silu(z[t]).

delta = clamp(dt + dt_bias, *dt_limit), through softplus first if asked. x, z [B, T, H, P]; dt [B, T, H]; A, dt_bias
[H]; B, C [B, T, G, N]; D [H] or [H, P]; state [B, H, P, N]; packed by cu_seqlens [S + 1]: batch 1, states [S, H, P, N].
"""

import math
from itertools import pairwise

import torch
from torch.nn.functional import silu, softplus


def _advance(S, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit):
    """One token: S [B, H, P, N]; x, z [B, H, P]; dt [B, H]; B, C [B, G, N]. Everything in S's dtype."""
    per_group = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(per_group, 1), C.repeat_interleave(per_group, 1)
    delta = dt if dt_bias is None else dt + dt_bias
    delta = (softplus(delta) if dt_softplus else delta).clamp(*dt_limit)
    S = torch.exp(delta * A)[..., None, None] * S + (delta[..., None] * x)[..., None] * B[:, :, None]
    y = (S * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]) * x
    return S, y if z is None else y * silu(z)


def _wide(x, dt, A, B, C, D, z, dt_bias, state):
    double = any(t is not None and t.dtype == torch.float64 for t in (x, dt, B, C, z))
    width = torch.float64 if double else torch.float32
    return [None if t is None else t.to(width) for t in (x, dt, A, B, C, D, z, dt_bias, state)]


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, math.inf),
    state=None, cu_seqlens=None, return_state=False, exact=False, chunk_size=None
):  # fmt: skip
    """Returns y [B, T, H, P] in x's dtype, or (y, state). It is sequential whatever `exact` and `chunk_size` are."""
    dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias, state = _wide(x, dt, A, B, C, D, z, dt_bias, state)
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [x[:, :0]], []
    for s, (begin, end) in enumerate(pairwise(ends)):
        S = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
        if state is not None:
            S = state.clone() if cu_seqlens is None else state[s : s + 1]
        for t in range(begin, end):
            gate = None if z is None else z[:, t]
            S, y = _advance(S, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, dt_bias, dt_softplus, dt_limit)
            ys.append(y[:, None])
        states.append(S)
    y = torch.cat(ys, 1).to(dtype)
    return (y, torch.cat(states)) if return_state else y


def ssd_step(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, math.inf)
):
    """x, z [B, H, P]; dt [B, H]; B, C [B, G, N]. Updates state in place and returns y [B, H, P]."""
    dtype = x.dtype
    x, dt, A, B, C, D, z, dt_bias, S = _wide(x, dt, A, B, C, D, z, dt_bias, state)
    S, y = _advance(S, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    state.copy_(S)
    return y.to(dtype)
