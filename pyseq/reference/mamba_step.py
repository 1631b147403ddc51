"""One token of a Mamba layer: convolution, W_x, W_dt, the recurrence and the gate; both states are updated in place."""

import torch
from torch.nn.functional import silu, softplus


def _normalise(v, eps):
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)


def mamba_step(
    conv_state, state, x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, *, rms_eps=None
):
    """x, z [B, D]; conv_state [B, D, W-1]; state [B, D, N]. Returns y [B, D] in x's dtype."""
    width = torch.float64 if torch.float64 in (x.dtype, z.dtype) else torch.float32
    conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D = (
        t.to(width) for t in (conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    )
    samples = torch.cat([conv_state.to(width), x.to(width)[..., None]], -1)
    a = (samples * conv_weight).sum(-1)
    u = silu(a if conv_bias is None else a + conv_bias.to(width))
    states = A.shape[1]
    parts = (u @ x_proj_weight.T).split([dt_proj_weight.shape[1], states, states], -1)
    low, B, C = parts if rms_eps is None else (_normalise(v, rms_eps) for v in parts)
    dt = softplus(low @ dt_proj_weight.T + dt_bias)
    h = torch.exp(dt[..., None] * A) * state.to(width) + (dt * u)[..., None] * B[:, None]
    y = ((h * C[:, None]).sum(-1) + D * u) * silu(z.to(width))
    conv_state.copy_(samples[..., 1:])
    state.copy_(h)
    return y.to(x.dtype)
