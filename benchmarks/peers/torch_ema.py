"""The moving average with torch alone (torch, BSD-3-Clause), and as the state-space dual that H-Net makes of it.

"loop": a Python loop over tokens, eager. "compiled": 32 unrolled steps under torch.compile, the state passed on;
compilation is not timed. "ssd": A = -1, dt = -log(1 - p), x / dt, B = p, C = 1, heads of 32 channels, with pyseq's own
op: what one primitive for both would cost.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import pyseq

from .inputs import Ema

STEPS = 32


def _chunk(y: Tensor, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(x.shape[1]):
        weight = p[:, t, None]
        y = weight * x[:, t] + (1 - weight) * y
        ys.append(y)
    return torch.stack(ys, 1).to(x.dtype), y


def _loop(step: Callable[..., tuple[Tensor, Tensor]], steps: int) -> Callable[..., Tensor]:
    def run(x: Tensor, p: Tensor) -> Tensor:
        y, ys = torch.zeros_like(x[:, 0], dtype=torch.float32), []
        for part, weight in zip(x.split(steps, 1), p.split(steps, 1), strict=True):
            out, y = step(y, part, weight)
            ys.append(out)
        return torch.cat(ys, 1)

    return run


def _dual(x: Tensor, p: Tensor) -> Tensor:
    dt = -torch.log1p(-p)
    heads = x.shape[-1] // 32
    parts = (x / dt.unsqueeze(-1)).to(x.dtype).unflatten(-1, (heads, 32))
    one = torch.ones_like(p)[..., None, None]
    steps = dt.unsqueeze(-1).expand(*dt.shape, heads)
    return pyseq.ssd(parts, steps, -torch.ones(heads, device=x.device), p[..., None, None], one).flatten(-2)


def ema(x: Ema, form: str, grad: bool = False) -> Callable[[], object]:
    """y, or the gradients of x and p."""
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.p)]
    function = {
        "loop": lambda: _loop(_chunk, x.x.shape[1] or 1),
        "compiled": lambda: _loop(torch.compile(_chunk, dynamic=False, fullgraph=True), STEPS),
        "ssd": lambda: _dual,
    }[form]()

    def call() -> object:
        with torch.set_grad_enabled(grad):
            y = function(*tensors)
            return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call
