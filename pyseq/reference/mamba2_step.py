"""One token of a Mamba-2 layer: convolution, the recurrence, gate and norm; both states are updated in place."""

import math

import torch
from torch.nn.functional import silu, softplus


def mamba2_step(
    conv_state, state, z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight=None, *, dt_limit=(0.0, math.inf),
    eps=1e-5, group_size=None, norm_before_gate=False
):  # fmt: skip
    """z [B, H P] or None; xBC [B, H P + 2 G N]; dt [B, H]; conv_state [B, H P + 2 G N, W-1]; state [B, H, P, N]."""
    double = any(t is not None and t.dtype == torch.float64 for t in (z, xBC, dt))
    wide = torch.float64 if double else torch.float32
    heads, width, states = state.shape[1:]
    conv_weight, A, D, dt_bias = (t.to(wide) for t in (conv_weight, A, D, dt_bias))
    samples = torch.cat([conv_state.to(wide), xBC.to(wide)[..., None]], -1)
    a = (samples * conv_weight).sum(-1)
    shared = (xBC.shape[1] - heads * width) // 2
    x, B, C = silu(a if conv_bias is None else a + conv_bias.to(wide)).split([heads * width, shared, shared], -1)
    x = x.unflatten(-1, (heads, width))
    copies = heads * states // shared
    B, C = (t.unflatten(-1, (-1, states)).repeat_interleave(copies, 1)[:, :, None] for t in (B, C))
    delta = softplus(dt.to(wide) + dt_bias).clamp(*dt_limit)
    S = torch.exp(delta * A)[..., None, None] * state.to(wide) + (delta[..., None] * x)[..., None] * B
    y = ((S * C).sum(-1) + (D if D.dim() == 2 else D[:, None]) * x).flatten(1)
    gate = 1.0 if z is None else silu(z.to(wide))
    if norm_weight is not None:
        v = y if norm_before_gate else y * gate
        groups = v.unflatten(-1, (-1, v.shape[-1] if group_size is None else group_size))
        y = norm_weight.to(wide) * (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(1)
    if norm_weight is None or norm_before_gate:
        y = y * gate
    conv_state.copy_(samples[..., 1:])
    state.copy_(S)
    return y.to(xBC.dtype)
