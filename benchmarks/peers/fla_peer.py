"""flash-linear-attention (MIT): its Triton kernels, and the plain torch form of simple GLA, which runs on a CPU too.

Timed: `causal_conv1d` with bias and SiLU in [B, T, D], which is also its own layout; `causal_conv1d_update`;
`rms_norm_gated`, which normalises before the gate; `chunk_simple_gla` and `naive_chunk_simple_gla` as the state-space
dual: q = C and k = B of every head, v = delta x, g = delta A, with softplus, bias and the D skip around them;
`chunk_rwkv7` and `chunk_gated_delta_rule`, and their plain forms `dplr_recurrence`, `dplr_chunkwise` (which scale q,
undone outside the timed part, and take [B, H, T, K]) and `naive_chunk_gated_delta_rule`.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import PeerMissing, require
from .inputs import Conv, ConvStep, Delta, GatedDelta, Norm, Ssd


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


def _naive(op: str, name: str) -> Callable[..., Any]:
    """A function of fla/ops/<op>/naive.py, loaded by its file: the packages around it import Triton."""
    require("einops", "fla-core")
    spec = importlib.util.find_spec("fla")
    path = Path(spec.submodule_search_locations[0]) / "ops" / op / "naive.py" if spec is not None else Path()
    if spec is None or not path.is_file():
        raise PeerMissing("fla-core is missing; `make bench-peers` installs the peers")
    loader = importlib.util.spec_from_file_location(f"fla_{name}", path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return getattr(module, name)


def ssd(x: Ssd, grad: bool, naive: bool) -> Callable[[], Any]:
    """y, or the gradients of x, dt, A, B, C, D, dt_bias."""
    if naive:
        function = _naive("simple_gla", "naive_chunk_simple_gla")
    else:
        function = require("fla.ops.simple_gla", "fla-core").chunk_simple_gla
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.dt, x.A, x.B, x.C, x.D, x.dt_bias)]
    copies = x.x.shape[2] // x.B.shape[2]

    def call() -> Any:
        data, dt, A, B, C, D, bias = tensors
        with torch.set_grad_enabled(grad):
            delta = F.softplus(dt.float() + bias)
            k, q = (t.repeat_interleave(copies, 2) for t in (B, C))
            v = (delta.unsqueeze(-1) * data).to(data.dtype)
            y = function(q, k, v, g=delta * A, scale=1.0)[0] + D.unsqueeze(-1) * data
            return torch.autograd.grad(y.to(data.dtype), tensors, x.dy) if grad else y

    return call


def delta_rule(x: Delta, grad: bool, form: str) -> Callable[[], Any]:
    """y, or the gradients of q, k, v, a, b, g. `form`: "triton", or the plain "recurrence" or "chunks"."""
    given = (x.q, x.k, x.v, x.a, x.b, x.g)
    if form == "triton":
        function = require("fla.ops.rwkv7", "fla-core").chunk_rwkv7
        tensors = [t.clone().requires_grad_(grad) for t in given]
    else:
        name = {"recurrence": "dplr_recurrence", "chunks": "dplr_chunkwise"}[form]
        function = _naive("generalized_delta_rule/dplr", name)
        q = x.q * x.q.shape[-1] ** 0.5
        tensors = [t.transpose(1, 2).contiguous().requires_grad_(grad) for t in (q, *given[1:])]

    def call() -> Any:
        q, k, v, a, b, g = tensors
        with torch.set_grad_enabled(grad):
            y = function(q, g, k, v, a, b)[0] if form == "triton" else function(q, k, v, a, b, g)[0].transpose(1, 2)
            return torch.autograd.grad(y.to(x.v.dtype), tensors, x.dy) if grad else y

    return call


def gated_delta_rule(x: GatedDelta, grad: bool, naive: bool) -> Callable[[], Any]:
    """y, or the gradients of q, k, v, g, beta."""
    if naive:
        function = _naive("gated_delta_rule", "naive_chunk_gated_delta_rule")
    else:
        function = require("fla.ops.gated_delta_rule", "fla-core").chunk_gated_delta_rule
    tensors = [t.clone().requires_grad_(grad) for t in (x.q, x.k, x.v, x.g, x.beta)]

    def call() -> Any:
        with torch.set_grad_enabled(grad):
            y = function(*tensors)[0]
            return torch.autograd.grad(y.to(x.v.dtype), tensors, x.dy) if grad else y

    return call
