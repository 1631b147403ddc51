"""Small RWKV-7 layers of every kind, and their parameters under the names of the authors' checkpoints."""

import pytest
import torch

import pyseq

KINDS = {
    "plain": {},
    "first": {"layer_idx": 0, "n_layer": 3},
    "scaled": {"layer_idx": 1, "n_layer": 3, "iclr_scale": 2},
    "narrow": {"decay_rank": 3, "iclr_rank": 5, "value_rank": 2, "gate_rank": 7, "d_ffn": 20},
}
by_kind = pytest.mark.parametrize("kind", KINDS)
WIDTH, HEAD = 24, 8


def make(kind="plain", dtype=None, seed=0):
    torch.manual_seed(seed)
    layer = pyseq.RWKV7(WIDTH, HEAD, dtype=torch.float64, **KINDS[kind])
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.to(dtype or torch.get_default_dtype())


def authors(layer):
    """The layer as block 0 of a checkpoint."""
    z = {}
    for name, p in layer.state_dict().items():
        if name == "att.mix":
            z |= {f"att.x_{letter}": row for letter, row in zip("rwkvag", p, strict=True)}
        elif name == "ffn.mix":
            z["ffn.x_k"] = p
        elif name.split(".")[1][0] in "wavg" and name.split(".")[1][1:] in "12":
            z[name.removesuffix(".weight")] = p.t()
        else:
            z[name] = p
    return {"blocks.0." + name: p for name, p in z.items()}


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().item()
    assert (got.double() - expected.double()).abs().max().item() <= rtol * scale


def close_states(a, b, rtol=2e-5):
    assert type(a) is type(b)
    for got, want in zip(a, b, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        if want.numel():
            close(got, want, rtol)
