"""causal_conv1d with SiLU against what a user writes in PyTorch: conv1d + silu, and a compiled sum of shifts.

Roofline at A = (B 1, T 2048, D 1536, W 4), float32. Forward reads x and writes y, 2 x 12.6 MB; backward reads x and dy
and writes dx, 3 x 12.6 MB. Arithmetic is below that: 3.1 M exp and quotients each way. A fresh output costs about
9 GB/s of page faults where the allocator has given the last one back to the system: peers pay the same.
"""

import pytest
import torch

import pyseq
from benchmarks.peers import inputs, torch_conv

SHAPES = {"A": (1, 2048, 1536), "B": (4, 1024, 512)}
WIDTH = 4
TARGETS = {"forward": {"torch conv1d": 8, "compiled shift-add": 2.3},
           "forward+backward": {"torch conv1d": 6, "compiled shift-add": 3.5}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", TARGETS)
def test_causal_conv1d(compare, direction, shape, dtype):
    grad = direction != "forward"
    case = inputs.conv(*SHAPES[shape], WIDTH, dtype)
    x, weight, bias = (t.detach().clone().requires_grad_(grad) for t in (case.x, case.weight, case.bias))
    dy = torch.randn_like(x)

    def ours():
        y = pyseq.causal_conv1d(x, weight, bias, activation="silu")
        if grad:
            torch.autograd.grad(y, (x, weight, bias), dy)

    peer = "forward_backward" if grad else "forward"
    compare(
        f"causal_conv1d + silu {direction}, {shape}, {str(dtype)[6:]}",
        {"pyseq": lambda: ours,
         "torch conv1d": lambda: getattr(torch_conv, f"conv1d_{peer}")(case),
         "compiled shift-add": lambda: getattr(torch_conv, f"shift_add_{peer}")(case)},
        targets=TARGETS[direction] if (shape, dtype) == ("A", torch.float32) else None,
        bytes=(5 if grad else 2) * x.numel() * x.element_size(),
    )


def test_causal_conv1d_step(compare):
    state, x = torch.zeros(1, 1536, WIDTH - 1), torch.randn(1, 1536)
    weight, bias = torch.randn(1536, WIDTH), torch.randn(1536)

    @torch.inference_mode()
    def ours():
        return pyseq.causal_conv1d_step(state, x, weight, bias, activation="silu")

    @torch.inference_mode()
    def torch_step():
        window = torch.cat([state, x[..., None]], -1)
        state.copy_(window[..., 1:])
        return torch.nn.functional.silu((window * weight).sum(-1) + bias)

    compare("causal_conv1d_step, batch 1, D 1536", {"pyseq": lambda: ours, "torch": lambda: torch_step})
