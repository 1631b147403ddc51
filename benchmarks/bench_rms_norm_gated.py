"""rms_norm_gated against what a user writes in PyTorch.

Roofline, (B 4, T 512, D 768) float32: forward with residual reads x and residual and writes y and the sum, 4 x 6.3 MB;
at 45 GB/s of memory that is 0.56 ms, from cache (32 MB) a quarter of it. The gated form computes one exp per element,
twice: 3.1 M exp, 0.13 ms on two cores at 24 G exp/s. Backward reads dy, the sum and dsum and writes dx and dresidual.
"""

import pytest
import torch

import pyseq

SHAPE = (4, 512, 768)


def plain(x, weight, z=None, residual=None):
    s = x if residual is None else x + residual
    v = s if z is None else s * torch.nn.functional.silu(z)
    return torch.nn.functional.rms_norm(v, (v.shape[-1],), weight, 1e-5), s


WHO = {
    "pyseq": lambda x, w, z, r: pyseq.rms_norm_gated(x, w, z, residual=r),
    "torch": plain,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["residual", "gate"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("who", WHO)
def test_rms_norm_gated(timed, who, direction, form, dtype):
    grad = direction != "forward"
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=grad)
    weight = torch.ones(SHAPE[-1], requires_grad=grad)
    z = torch.randn(SHAPE, dtype=dtype, requires_grad=grad) if form == "gate" else None
    residual = torch.randn(SHAPE, requires_grad=grad) if form == "residual" else None

    def call():
        y = WHO[who](x, weight if who == "pyseq" else weight.to(dtype), z, residual)
        y = y[0] if isinstance(y, tuple) else y
        if grad:
            y.backward(dy)

    dy = torch.randn(SHAPE, dtype=dtype)
    streams = 4 if form == "residual" else 3
    timed(call, work=f"rms_norm_gated {form}, {direction}, {dtype}", who=who,
          bytes=streams * x.numel() * x.element_size() * (2 if grad else 1))
