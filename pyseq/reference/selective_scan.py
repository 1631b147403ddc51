"""Selective scan: h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t], y[t] = (<C[t], h[t]> + D u[t]) silu(z[t]).

delta = dt + dt_bias, through softplus if asked. u, dt, z [B, T, D]; A [D, N]; B, C [B, T, N] or [B, T, G, N];
D, dt_bias [D]; state [B, D, N]; packed by cu_seqlens [S + 1]: batch 1 and states [S, D, N].
"""

from itertools import pairwise

import torch
from torch.nn.functional import silu, softplus


def _advance(h, u, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """One token: h [B, D, N]; u, dt, z [B, D]; B, C [B, G, N]. Everything in h's dtype."""
    per_group = u.shape[-1] // B.shape[-2]
    B, C = B.repeat_interleave(per_group, -2), C.repeat_interleave(per_group, -2)
    delta = dt if dt_bias is None else dt + dt_bias
    delta = softplus(delta) if dt_softplus else delta
    h = torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B
    y = (C * h).sum(-1)
    y = y if D is None else y + D * u
    return h, y if z is None else y * silu(z)


def _wide(u, dt, A, B, C, D, z, dt_bias, state):
    double = any(t is not None and t.dtype == torch.float64 for t in (u, dt, B, C, z))
    width = torch.float64 if double else torch.float32
    return [None if t is None else t.to(width) for t in (u, dt, A, B, C, D, z, dt_bias, state)]


def selective_scan(
    u, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, state=None, cu_seqlens=None, return_state=False
):
    """Returns y [B, T, D] in u's dtype, or (y, state)."""
    dtype = u.dtype
    u, dt, A, B, C, D, z, dt_bias, state = _wide(u, dt, A, B, C, D, z, dt_bias, state)
    B, C = (t.unsqueeze(2) if t.dim() == 3 else t for t in (B, C))
    ends = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    ys, states = [u[:, :0]], []
    for s, (begin, end) in enumerate(pairwise(ends)):
        h = u.new_zeros(u.shape[0], *A.shape)
        if state is not None:
            h = state.clone() if cu_seqlens is None else state[s : s + 1]
        for t in range(begin, end):
            gate = None if z is None else z[:, t]
            h, y = _advance(h, u[:, t], dt[:, t], A, B[:, t], C[:, t], D, gate, dt_bias, dt_softplus)
            ys.append(y[:, None])
        states.append(h)
    y = torch.cat(ys, 1).to(dtype)
    return (y, torch.cat(states)) if return_state else y


def selective_scan_step(state, u, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False):
    """u, dt, z [B, D]; B, C [B, N] or [B, G, N]. Updates state in place and returns y [B, D]."""
    dtype = u.dtype
    u, dt, A, B, C, D, z, dt_bias, h = _wide(u, dt, A, B, C, D, z, dt_bias, state)
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    h, y = _advance(h, u, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state.copy_(h)
    return y.to(dtype)
