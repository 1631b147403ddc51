"""ema against what a user writes in torch, and against H-Net's way, the state-space dual with one state.

Roofline, (B 4, T 1024, D 1024) float32: forward reads x and writes y, 34 MB; p is nothing beside them. Forward
and backward read x and write y, write and read the y of every 16th token, read x and dy and write dx: 5.1 such tensors.
Two multiply-adds a sample are half a million cycles of one AVX-512 unit: far below.
"""

from functools import partial

import pytest
import torch

import pyseq
from benchmarks.peers import inputs, torch_ema

SHAPE = (4, 1024, 1024)
TARGETS = {"forward": {"torch loop": 5, "torch, compiled loop": 2}, "forward+backward": {"torch, compiled loop": 2}}


def ours(x, grad):
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.p)]

    def call():
        y = pyseq.ema(*tensors)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("direction", TARGETS)
def test_ema(compare, direction, dtype):
    grad, x = direction != "forward", inputs.ema(*SHAPE, dtype)
    forms = {"torch, compiled loop": "compiled", "pyseq.ssd, one state": "ssd"}
    if not grad:   # its backward is quadratic in T: every token's slice has a gradient of all of x
        forms["torch loop"] = "loop"
    cases = {"pyseq": partial(ours, x, grad)}
    cases |= {name: partial(torch_ema.ema, x, form, grad) for name, form in forms.items()}
    kept = 2 * 4 * x.x.numel() / 16 if grad else 0
    compare(f"ema {direction}, {str(dtype)[6:]}", cases, targets=TARGETS[direction],
            bytes=(5 if grad else 2) * x.x.numel() * x.x.element_size() + kept, rounds=5)


@pytest.mark.parametrize("batch", [1, 8])
def test_ema_step(compare, batch):
    x = inputs.ema_step(batch, 1024)

    @torch.inference_mode()
    def call():
        return pyseq.ema_step(x.state, x.x, x.p)

    @torch.inference_mode()
    def plain():
        x.state.lerp_(x.x, x.p[:, None])
        return x.state.clone()

    compare(f"ema_step, D 1024, batch {batch}", {"pyseq": lambda: call, "torch": lambda: plain},
            bytes=4 * x.x.numel() * 4)
