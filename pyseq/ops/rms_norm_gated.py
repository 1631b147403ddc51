"""Root-mean-square norm with a gate and a residual: contract and gradient. Kernels: csrc/rms_norm_gated/."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define
from ._check import Dims, is_float64

_SUM = "Tensor x, Tensor weight, Tensor? z, Tensor? residual"


def _forward_fake(x, weight, z, residual, eps, group_size, norm_before_gate):
    rows = x.numel() // x.shape[-1]
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape if residual is not None else (0,), dtype=torch.float32)
    return y, total, x.new_empty((rows, x.shape[-1] // group_size), dtype=torch.float32)


def _backward_fake(dy, dsum, s, weight, z, rstd, x, residual, group_size, norm_before_gate):
    def like(t):
        return s.new_empty(s.shape, dtype=t.dtype) if t is not None else s.new_empty((0,), dtype=torch.float32)

    return like(s if x is None else x), weight.new_empty(weight.shape), like(z), like(residual)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, z, residual, _, ctx.group_size, ctx.norm_before_gate = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    # With a residual the backward reads the sum; x and the residual only lend their dtypes.
    ctx.dtypes = (x.new_empty(0), None) if residual is None else (x.new_empty(0), residual.new_empty(0))
    ctx.save_for_backward(x if residual is None else total, weight, z, rstd)


def _gradient(kernels: Any, ctx: Any, dy: Any, dsum: Any, _: Any) -> tuple:
    s, weight, z, rstd = ctx.saved_tensors
    if dy is None and dsum is None:
        return (None,) * 7
    x, residual = ctx.dtypes
    dsum = None if residual is None else dsum   # without a residual the sum is a 0-element tensor, and so its gradient
    dy = torch.zeros_like(s, dtype=x.dtype) if dy is None else dy
    dx, dweight, dz, dresidual = kernels.backward(
        dy, dsum, s, weight, z, rstd, x, residual, ctx.group_size, ctx.norm_before_gate
    )
    return dx, dweight, dz if z is not None else None, dresidual if residual is not None else None, None, None, None


_OP = define(
    "rms_norm_gated",
    forward=Kernel(
        f"({_SUM}, float eps, int group_size, bool norm_before_gate) -> (Tensor y, Tensor sum, Tensor rstd)",
        _forward_fake,
    ),
    backward=Kernel(
        "(Tensor dy, Tensor? dsum, Tensor s, Tensor weight, Tensor? z, Tensor rstd, Tensor? x, Tensor? residual, "
        "int group_size, bool norm_before_gate) -> (Tensor dx, Tensor dweight, Tensor dz, Tensor dresidual)",
        _backward_fake,
    ),
    save=_save,
    gradient=_gradient,
)


def rms_norm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Root-mean-square norm, with the gate of Mamba-2 and the residual of a pre-norm block fused in.

        s = x + residual                            s = x where no residual is given
        y = w v / sqrt(mean(v^2) + eps)             v = s silu(z); v = s where no z is given
        y = w s / sqrt(mean(s^2) + eps) silu(z)     with norm_before_gate

    The mean runs over groups of `group_size` neighbouring channels (None: all D).

    Args:
        x: [..., D], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`).
        weight: [D], any float dtype, read as float32.
        z: [..., D], the gate.
        residual: [..., D]; then the sum is formed, used and returned in float32.
        eps: added to the mean square, >= 0.
        group_size: channels per mean; divides D.
        norm_before_gate: normalise first, gate last.

    Returns:
        y [..., D] in x's dtype; with a residual, (y, x + residual in float32).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.

    Source: Zhang and Sennrich, 2019 (RMSNorm); Dao and Gu, 2024 (the gated form, Mamba-2).
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"rms_norm_gated: x is {type(x).__name__}, expected a tensor [..., D]")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"rms_norm_gated: x has shape {list(x.shape)}, expected [..., D] with D >= 1")
    dims = Dims("rms_norm_gated")
    letters = "ABCEFGHIJKLMNOPQRSTUVWXYZ"[: x.dim() - 1] + "D"
    dims.match("x", x, letters)
    dims.match("weight", weight, "D")
    dims.optional("z", z, letters)
    dims.optional("residual", residual, letters)
    dim = x.shape[-1]
    group = dim if group_size is None else group_size
    if not isinstance(group, int) or isinstance(group, bool):
        raise TypeError(f"rms_norm_gated: group_size is {type(group).__name__}, expected an int or None")
    if group < 1 or dim % group:
        raise dims.fail("group_size", group, f"a divisor of D = {dim}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"rms_norm_gated: eps is {type(eps).__name__}, expected a float")
    if not eps >= 0:
        raise dims.fail("eps", eps, "a number >= 0")
    dims.flag("norm_before_gate", norm_before_gate)
    if is_float64(x, z, residual):
        return reference.rms_norm_gated(
            x, weight, z, residual=residual, eps=eps, group_size=group, norm_before_gate=norm_before_gate
        )
    y, total, _ = _OP.active.forward(x, weight, z, residual, eps, group, norm_before_gate)
    return y if residual is None else (y, total)


_OP.function = rms_norm_gated
_OP.float32 = ("weight",)
