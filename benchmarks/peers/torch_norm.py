"""The gated RMS norm with torch alone (torch, BSD-3-Clause): the formula in float32, eager or under torch.compile."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Norm


def _formula(x: Tensor, weight: Tensor, z: Tensor, norm_before_gate: bool) -> Tensor:
    gate, data = F.silu(z.float()), x.float()
    data = data if norm_before_gate else data * gate
    y = weight * data * torch.rsqrt(data.square().mean(-1, keepdim=True) + 1e-5)
    return (y * gate if norm_before_gate else y).to(x.dtype)


def rms_norm_gated(x: Norm, norm_before_gate: bool, grad: bool, compiled: bool) -> Callable[[], Any]:
    """y, or the gradients of x, weight, z."""
    function = torch.compile(_formula, dynamic=False, fullgraph=True) if compiled else _formula
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.weight, x.z)]

    def call() -> Any:
        data, weight, z = tensors
        y = function(data, weight, z, norm_before_gate)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call
