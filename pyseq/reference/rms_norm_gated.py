"""Gated RMS norm: s = x + residual, v = s silu(z), y = w v / sqrt(mean(v^2) + eps), the mean over groups of channels.

With norm_before_gate v = s and the gate multiplies y instead. Without z there is no gate.
"""

import torch
from torch.nn.functional import silu


def _wide(t, *others):
    double = any(o is not None and o.dtype == torch.float64 for o in (t, *others))
    return t.to(torch.float64 if double else torch.float32)


def rms_norm_gated(x, weight, z=None, *, residual=None, eps=1e-5, group_size=None, norm_before_gate=False):
    """x, z, residual [..., D]; weight [D]. Returns y, or (y, x + residual) where a residual is given."""
    s = _wide(x, z, residual)
    if residual is not None:
        s = s + residual
    gate = None if z is None else silu(z.to(s.dtype))
    v = s if gate is None or norm_before_gate else s * gate
    grouped = v.unflatten(-1, (-1, group_size or x.shape[-1]))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    y = grouped.flatten(-2) * weight.to(s.dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    y = y.to(x.dtype)
    return y if residual is None else (y, s)
