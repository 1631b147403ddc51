"""flash-linear-attention (MIT): its Triton short convolution and gated RMS norm.

Timed: `causal_conv1d` with bias and SiLU in [B, T, D], which is also its own layout; `causal_conv1d_update`;
`rms_norm_gated`, which normalises before the gate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import require
from .inputs import Conv, ConvStep, Norm


def causal_conv1d(x: Conv, grad: bool) -> Callable[[], Any]:
    """y, or the gradients of x, weight, bias."""
    function = require("fla.modules.convolution", "fla-core").causal_conv1d
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.weight, x.bias)]

    def call() -> Any:
        data, weight, bias = tensors
        y, _ = function(data, weight, bias, activation="silu")
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def causal_conv1d_step(x: ConvStep) -> Callable[[], Tensor]:
    """Its cache holds the W latest samples, the current one among them."""
    function = require("fla.modules.convolution", "fla-core").causal_conv1d_update
    cache = torch.cat([x.state.new_zeros(*x.state.shape[:2], 1), x.state], -1)
    token = x.x[:, None]

    @torch.no_grad()
    def call() -> Tensor:
        return function(token, cache, weight=x.weight, bias=x.bias, activation="silu")[0][:, 0]

    return call


def rms_norm_gated(x: Norm, grad: bool) -> Callable[[], Any]:
    """y, or the gradients of x, weight, z."""
    function = require("fla.modules.fused_norm_gate", "fla-core").rms_norm_gated
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.weight, x.z)]

    def call() -> Any:
        data, weight, z = tensors
        y = function(data, z, weight, None, activation="swish", eps=1e-5)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call
