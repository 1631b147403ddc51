"""rms_norm_gated against what a user writes in PyTorch.

Roofline, (B 4, T 512, D 768) float32: forward with a residual reads x and residual and writes y and the sum, four times
6.3 MB; the gated form reads x and z and writes y. Backward reads and writes as much again. The exp of the gate, twice
per element, is far below that: 3.1 M exp are 0.13 ms on two cores at 24 G exp/s.
"""

import pytest
import torch

import pyseq

SHAPE = (4, 512, 768)


def plain(x, weight, z=None, *, residual=None):
    s = x if residual is None else x + residual
    v = s if z is None else s * torch.nn.functional.silu(z)
    return torch.nn.functional.rms_norm(v, (v.shape[-1],), weight.to(v.dtype), 1e-5)


def ours(x, weight, z=None, *, residual=None):
    y = pyseq.rms_norm_gated(x, weight, z, residual=residual)
    return y if residual is None else y[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["residual", "gate"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_rms_norm_gated(compare, direction, form, dtype):
    grad = direction != "forward"
    x, dy = (torch.randn(SHAPE, dtype=dtype) for _ in range(2))
    tensors = {"x": x, "weight": torch.ones(SHAPE[-1])}
    tensors |= {"z": torch.randn(SHAPE, dtype=dtype)} if form == "gate" else {"residual": torch.randn(SHAPE)}
    leaves = [t.requires_grad_(grad) for t in tensors.values()]

    def case(function):
        def call():
            y = function(**tensors)
            if grad:
                torch.autograd.grad(y, leaves, dy)

        return lambda: call

    streams = (4 if form == "residual" else 3) * (2 if grad else 1)
    compare(f"rms_norm_gated {form}, {direction}, {str(dtype)[6:]}", {"pyseq": case(ours), "torch": case(plain)},
            bytes=streams * x.numel() * x.element_size())
