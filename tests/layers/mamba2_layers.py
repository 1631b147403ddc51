"""Small Mamba-2 layers of every kind, the layer of the paper as a loop, and how close is close."""

import pytest
import torch
import torch.nn.functional as F

import pyseq

KINDS = {
    "plain": {},
    "grouped": {"ngroups": 3},
    "biased": {"bias": True, "conv_bias": False, "d_conv": 3},
    "narrow": {"d_ssm": 24, "ngroups": 3},
    "ungated norm": {"norm_before_gate": True, "ngroups": 2},
    "no norm": {"rmsnorm": False},
    "D per channel": {"D_has_hdim": True},
    "limited": {"dt_limit": (0.02, 0.05)},
    "all": {"d_ssm": 24, "rmsnorm": False, "D_has_hdim": True, "bias": True, "d_conv": 1},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="plain", dtype=None, seed=0, **options):
    torch.manual_seed(seed)
    layer = pyseq.Mamba2(24, d_state=5, headdim=8, dtype=dtype, **KINDS[kind], **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def loop(layer, x):
    """The layer of the paper, one token after the other."""
    H, P, G, N, W = layer.nheads, layer.headdim, layer.ngroups, layer.d_state, layer.d_conv
    rest, d, wide = layer.d_inner - H * P, H * P, H * P + 2 * G * N
    z0, x0, z, u, dt = F.linear(x, layer.in_proj.weight, layer.in_proj.bias).split([rest, rest, d, wide, H], -1)
    past = F.pad(u, (0, 0, W - 1, 0))
    u = sum(past[:, k : k + x.shape[1]] * layer.conv1d.weight[:, 0, k] for k in range(W))
    u, B, C = F.silu(u if layer.conv1d.bias is None else u + layer.conv1d.bias).split([d, G * N, G * N], -1)
    B, C = (v.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for v in (B, C))
    u, dt = u.unflatten(-1, (H, P)), F.softplus(dt + layer.dt_bias).clamp(*layer.dt_limit)
    S, ys = x.new_zeros(x.shape[0], H, P, N), []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * layer.A_log.exp())
        S = decay[..., None, None] * S + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((S @ C[:, t, ..., None])[..., 0])
    y = (torch.stack(ys, 1) + layer.D.view(H, -1) * u).flatten(-2)
    if not layer.rmsnorm:
        y = y * F.silu(z)
    else:
        y = y if layer.norm_before_gate else y * F.silu(z)
        groups = y.unflatten(-1, (G, -1))
        y = layer.norm.weight * (groups / torch.sqrt(groups.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2)
        y = y * F.silu(z) if layer.norm_before_gate else y
    return F.linear(torch.cat([F.silu(z0) * x0, y], -1), layer.out_proj.weight, layer.out_proj.bias)


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= rtol * scale


def close_states(a, b, rtol=2e-5):
    assert type(a) is type(b)
    for got, want in zip(a, b, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            close(got, want, rtol)
