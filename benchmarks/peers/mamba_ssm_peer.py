"""mamba-ssm (Apache-2.0): its CUDA selective scan, and its Triton kernels, which need no compiled code.

Timed: `selective_scan_fn` in its own layout, [B, D, T] and [B, N, T], with softplus, skip and gate; its gradient
through autograd; `mamba_chunk_scan_combined` in chunks of 256, as its Mamba2 module calls it, and its gradient;
`selective_state_update`, for Mamba-2 with a head's A, dt, D and bias expanded to its channels, as Mamba2 does;
`rmsnorm_fn`; a layer's token as its Mamba module runs it, with causal-conv1d.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import PeerMissing, require
from .inputs import Ema, Mamba2Step, MambaStep, Norm, Scan, ScanStep, Ssd, SsdStep


def _triton(name: str) -> ModuleType:
    """A module of mamba_ssm.ops.triton. The package's own __init__ insists on the compiled extension: it is not run."""
    path = f"mamba_ssm.ops.triton.{name}"
    spec = importlib.util.find_spec("mamba_ssm") if "mamba_ssm" not in sys.modules else None
    if spec is not None:
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise PeerMissing(f"mamba-ssm is missing ({error})") from error


def _scan(x: Scan) -> tuple[Callable[..., Tensor], list[Tensor]]:
    require("selective_scan_cuda", "mamba-ssm's compiled extension")
    function = require("mamba_ssm.ops.selective_scan_interface", "mamba-ssm").selective_scan_fn
    u, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (x.u, x.dt, x.B, x.C, x.z))

    def call(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        return function(u, dt, A, B, C, D, z, delta_bias=bias, delta_softplus=True)

    return call, [u, dt, x.A, B, C, x.D, z, x.dt_bias]


def selective_scan_forward(x: Scan) -> Callable[[], Tensor]:
    function, arguments = _scan(x)

    @torch.no_grad()
    def call() -> Tensor:
        return function(*arguments).transpose(1, 2)

    return call


def selective_scan_forward_backward(x: Scan) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias."""
    function, arguments = _scan(x)
    leaves = [t.clone().requires_grad_() for t in arguments]
    dy = x.dy.transpose(1, 2).contiguous()

    def call() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(function(*leaves), leaves, dy)
        return tuple(g.transpose(1, 2) if g.dim() == 3 else g for g in grads)

    return call


def selective_scan_step(x: ScanStep) -> Callable[[], Tensor]:
    update = _triton("selective_state_update").selective_state_update

    @torch.no_grad()
    def call() -> Tensor:
        return update(x.state, x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.dt_bias, dt_softplus=True)

    return call


def ssd(x: Ssd, grad: bool) -> Callable[[], object]:
    """y, or the gradients of x, dt, A, B, C, D, dt_bias."""
    function = _triton("ssd_combined").mamba_chunk_scan_combined
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.dt, x.A, x.B, x.C, x.D, x.dt_bias)]

    def call() -> object:
        data, dt, A, B, C, D, bias = tensors
        y = function(data, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def ema(x: Ema, grad: bool) -> Callable[[], object]:
    """As H-Net calls it: one state, heads of 32 channels, x divided by the step. y, or the gradients of x and p."""
    function = _triton("ssd_combined").mamba_chunk_scan_combined
    heads, tensors = x.x.shape[-1] // 32, [t.clone().requires_grad_(grad) for t in (x.x, x.p)]
    A, C = -torch.ones(heads, device=x.x.device), torch.ones(*x.p.shape, 1, 1, device=x.x.device, dtype=x.x.dtype)

    def call() -> object:
        data, p = tensors
        dt = -torch.log1p(-p.float()).to(data.dtype)
        parts = (data / dt.unsqueeze(-1)).unflatten(-1, (heads, 32))
        steps = dt.unsqueeze(-1).expand(*dt.shape, heads).contiguous()
        y = function(parts, steps, A, p.to(data.dtype)[..., None, None], C, chunk_size=256).flatten(-2)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call


def ssd_step(x: SsdStep) -> Callable[[], Tensor]:
    update = _triton("selective_state_update").selective_state_update
    width, states = x.state.shape[2:]
    dt, D, bias = (t.unsqueeze(-1).expand(*t.shape, width) for t in (x.dt, x.D, x.dt_bias))
    A = x.A[:, None, None].expand(-1, width, states)

    @torch.no_grad()
    def call() -> Tensor:
        return update(x.state, x.x, dt, A, x.B, x.C, D, None, bias, dt_softplus=True)

    return call


def mamba2_step(x: Mamba2Step) -> Callable[[], Tensor]:
    """As its layer's step: three kernels, the norm with its gate the last."""
    convolve = require("causal_conv1d", "causal-conv1d").causal_conv1d_update
    update, norm = _triton("selective_state_update").selective_state_update, _triton("layernorm_gated").rmsnorm_fn
    heads, width, states = x.state.shape[1:]
    conv_state = x.conv_state.to(x.xBC.dtype)
    A = x.A[:, None, None].expand(-1, width, states)
    dt, D, bias = (t.unsqueeze(-1).expand(*t.shape, width) for t in (x.dt, x.D, x.dt_bias))

    @torch.no_grad()
    def call() -> Tensor:
        convolved = convolve(x.xBC, conv_state, x.conv_weight, x.conv_bias, activation="silu")
        u, B, C = convolved.split([heads * width, states, states], -1)
        y = update(
            x.state, u.unflatten(1, (heads, width)), dt, A, B[:, None], C[:, None], D, None, bias, dt_softplus=True
        )
        return norm(y.flatten(1), x.norm_weight, None, z=x.z, eps=1e-5, norm_before_gate=False)

    return call


def mamba_step(x: MambaStep) -> Callable[[], Tensor]:
    convolve = require("causal_conv1d", "causal-conv1d").causal_conv1d_update
    update = _triton("selective_state_update").selective_state_update
    states, rank, conv_state = x.A.shape[1], x.dt_proj_weight.shape[1], x.conv_state.to(x.x.dtype)

    @torch.no_grad()
    def call() -> Tensor:
        u = convolve(x.x, conv_state, x.conv_weight, x.conv_bias, activation="silu")
        low, B, C = F.linear(u, x.x_proj_weight).split([rank, states, states], -1)
        dt = F.linear(low, x.dt_proj_weight)
        return update(x.state, u, dt, x.A, B, C, x.D, x.z, x.dt_bias, dt_softplus=True)

    return call


def rms_norm_gated(x: Norm, norm_before_gate: bool, grad: bool) -> Callable[[], object]:
    """y, or the gradients of x, weight, z."""
    function = _triton("layernorm_gated").rmsnorm_fn
    tensors = [t.clone().requires_grad_(grad) for t in (x.x, x.weight, x.z)]

    def call() -> object:
        data, weight, z = tensors
        y = function(data, weight, None, z=z, eps=1e-5, norm_before_gate=norm_before_gate)
        return torch.autograd.grad(y, tensors, x.dy) if grad else y

    return call
