"""Causal depthwise convolution + SiLU with torch alone (torch, BSD-3-Clause).

Timed: `F.conv1d` with left padding by W - 1 and `F.silu`, eager, in conv1d's own layout [B, D, T]; and the sum of W
shifted products + SiLU under torch.compile, in [B, T, D]. Compilation is not timed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Conv


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, _, width = weight.shape
    return F.silu(F.conv1d(x, weight, bias, padding=width - 1, groups=channels)[..., : x.shape[-1]])


def _shift_add(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width, time = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = bias + sum(weight[:, k] * padded[:, k : k + time] for k in range(width))
    return F.silu(y).to(x.dtype)


def conv1d_forward(x: Conv) -> Callable[[], Tensor]:
    data, weight, bias = _channels_first(x)

    @torch.no_grad()
    def call() -> Tensor:
        return _conv1d(data, weight, bias).transpose(1, 2)

    return call


def conv1d_forward_backward(x: Conv) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of x, weight, bias."""
    leaves = [t.requires_grad_() for t in _channels_first(x)]
    dy = x.dy.transpose(1, 2).contiguous()

    def call() -> tuple[Tensor, ...]:
        dx, dweight, dbias = torch.autograd.grad(_conv1d(*leaves), leaves, dy)
        return dx.transpose(1, 2), dweight.squeeze(1), dbias

    return call


def shift_add_forward(x: Conv) -> Callable[[], Tensor]:
    op = torch.compile(_shift_add, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def call() -> Tensor:
        return op(x.x, x.weight, x.bias)

    return call


def shift_add_forward_backward(x: Conv) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of x, weight, bias."""
    op = torch.compile(_shift_add, dynamic=False, fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in (x.x, x.weight, x.bias)]
    return lambda: torch.autograd.grad(op(*leaves), leaves, x.dy)


def _channels_first(x: Conv) -> list[Tensor]:
    """conv1d wants one dtype for all its inputs."""
    return [x.x.transpose(1, 2).contiguous(), x.weight.unsqueeze(1).to(x.x.dtype), x.bias.to(x.x.dtype)]
