"""causal-conv1d (BSD-3-Clause): its CUDA kernels, channel-last, which is pyseq's layout and costs no copy.

Timed: `causal_conv1d_fn` with bias and SiLU on the transposed view, which it takes where D is a multiple of 8; its
gradient through autograd; `causal_conv1d_update`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import require
from .inputs import Conv, ConvStep


def causal_conv1d(x: Conv, grad: bool) -> Callable[[], Any]:
    """y, or the gradients of x, weight, bias."""
    function = require("causal_conv1d", "causal-conv1d").causal_conv1d_fn
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.weight, x.bias)]

    def call() -> Any:
        data, weight, bias = tensors
        y = function(data.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def causal_conv1d_step(x: ConvStep) -> Callable[[], Tensor]:
    function = require("causal_conv1d", "causal-conv1d").causal_conv1d_update
    state = x.state.to(x.x.dtype)

    @torch.no_grad()
    def call() -> Tensor:
        return function(x.x, state, x.weight, x.bias, activation="silu")

    return call
