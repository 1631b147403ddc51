"""Small Gated DeltaNet and Kimi Delta Attention layers of every kind, and both layers as a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F

import pyseq

SIZES = {"head_dim": 8, "num_heads": 2, "conv_size": 4}
KINDS = {
    "plain": (pyseq.GatedDeltaNet, {"expand_v": 1.5}),
    "negative": (pyseq.GatedDeltaNet, {"allow_neg_eigval": True}),
    "shared keys": (pyseq.GatedDeltaNet, {"num_v_heads": 4, "expand_v": 1, "conv_bias": True}),
    "wide values": (pyseq.GatedDeltaNet, {"head_dim": 4, "expand_v": 65}),   # more than the op takes at once
    "no gate": (pyseq.GatedDeltaNet, {"use_gate": False, "conv_size": 1}),
    "no conv": (pyseq.GatedDeltaNet, {"use_short_conv": False, "output_gate_activation": "sigmoid"}),
    "kimi": (pyseq.KimiDeltaAttention, {}),
    "kimi negative": (pyseq.KimiDeltaAttention, {"allow_neg_eigval": True, "num_v_heads": 4, "expand_v": 0.5}),
    "kimi bounded": (pyseq.KimiDeltaAttention, {"safe_gate": True, "lower_bound": -5.0, "conv_bias": True}),
}
by_kind = pytest.mark.parametrize("kind", KINDS)
WIDTH = 20


def make(kind="plain", dtype=None, seed=0):
    torch.manual_seed(seed)
    layer, options = KINDS[kind]
    layer = layer(WIDTH, dtype=dtype, **(SIZES | options))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def mixed(layer, x, name):
    """silu(conv(W x)) of q, k or v, tap by tap."""
    u = x @ getattr(layer, f"{name}_proj").weight.T
    if layer.use_short_conv:
        conv = getattr(layer, f"{name}_conv1d")
        taps = conv.weight.shape[-1]
        past = F.pad(u, (0, 0, taps - 1, 0))
        u = sum(past[:, i : i + x.shape[1]] * conv.weight[:, 0, i] for i in range(taps))
        u = u if conv.bias is None else u + conv.bias
    return u * torch.sigmoid(u)


def log_decay(layer, x):
    """[B, T, HV, K], whichever layer it is."""
    A = layer.A_log.exp()
    if isinstance(layer, pyseq.GatedDeltaNet):
        g = -A * torch.log1p(torch.exp(x @ layer.a_proj.weight.T + layer.dt_bias))
        return g[..., None].expand(*g.shape, layer.head_dim)
    f = x @ layer.f_proj[0].weight.T @ layer.f_proj[1].weight.T + layer.dt_bias
    f = f.unflatten(-1, (layer.num_v_heads, -1))
    A = A[:, None]
    if layer.lower_bound is None:
        return -A * torch.log1p(torch.exp(f))
    return layer.lower_bound / (1 + torch.exp(-A * f))


def gated(layer, y, x):
    """[B, T, HV, V] normalised per head and gated."""
    y = layer.o_norm.weight * y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5)
    if isinstance(layer, pyseq.KimiDeltaAttention):
        z = x @ layer.g_proj[0].weight.T @ layer.g_proj[1].weight.T + layer.g_proj[1].bias
        return y * torch.sigmoid(z).view(y.shape)
    if not layer.use_gate:
        return y
    z = (x @ layer.g_proj.weight.T).view(y.shape)
    return y * torch.sigmoid(z) * (1 if layer.output_gate_activation == "sigmoid" else z)


def loop(layer, x):
    """The layer of the paper, one token after the other, with a transition matrix per token."""
    B, T, _ = x.shape
    H, HV, K, V = layer.num_heads, layer.num_v_heads, layer.head_dim, layer.head_v_dim
    q, k, v = (mixed(layer, x, name) for name in "qkv")
    q, k = (u.view(B, T, H, K).repeat_interleave(HV // H, 2) for u in (q, k))
    q, k = (u / torch.sqrt(u.square().sum(-1, keepdim=True) + 1e-6) for u in (q, k))
    v, decay = v.view(B, T, HV, V), log_decay(layer, x).exp()
    beta = (2 if layer.allow_neg_eigval else 1) * torch.sigmoid(x @ layer.b_proj.weight.T)
    S, ys = x.new_zeros(B, HV, K, V), []
    for t in range(T):
        write = beta[:, t, :, None] * k[:, t]
        keep = torch.eye(K, dtype=x.dtype) - write[..., :, None] * k[:, t, :, None, :]
        S = keep @ torch.diag_embed(decay[:, t]) @ S + write[..., None] * v[:, t, :, None]
        ys.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / K**0.5)
    return gated(layer, torch.stack(ys, 1), x).flatten(-2) @ layer.o_proj.weight.T


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= rtol * scale


def close_states(a, b, rtol=2e-5):
    assert type(a) is type(b)
    for got, want in zip(a, b, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            close(got, want, rtol)
