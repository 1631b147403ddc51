"""Causal depthwise convolution along time: contract and gradient. Kernels: csrc/causal_conv1d/."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, bool silu"


def _forward_fake(x, weight, bias, state, cu_seqlens, silu, return_state):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, x.shape[2], weight.shape[1] - 1) if return_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _backward_fake(dy, dnew_state, x, weight, bias, state, cu_seqlens, silu):
    def like(t):
        return x.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    return like(x), like(weight), like(bias), like(state)


def _step_fake(state, x, weight, bias, silu):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, state, cu_seqlens, ctx.silu, ctx.return_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, state, cu_seqlens)


def _gradient(kernels: Any, ctx: Any, dy: Any, dnew_state: Any) -> tuple:
    x, weight, bias, state, cu_seqlens = ctx.saved_tensors
    if not ctx.return_state:   # the state is a 0-element tensor then, and so its gradient
        dnew_state = None
    if dy is None and dnew_state is None:
        return (None,) * 7
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dstate = kernels.backward(dy, dnew_state, x, weight, bias, state, cu_seqlens, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if state is None else dstate, None, None, None


_OP = define(
    "causal_conv1d",
    forward=Kernel(f"({_INPUTS}, bool return_state) -> (Tensor y, Tensor new_state)", _forward_fake),
    backward=Kernel(
        f"(Tensor dy, Tensor? dnew_state, {_INPUTS}) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel("(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor", _step_fake),
    save=_save,
    gradient=_gradient,
)


def _check(dims: Dims, x: object, letters: str, weight: object, bias: object, activation: object) -> None:
    dims.match("x", x, letters)
    dims.match("weight", weight, "DW")
    if dims["W"] == 0:
        raise dims.fail("weight", "of width 0", "[D, W] with W >= 1")
    dims.optional("bias", bias, "D")
    if activation not in (None, "silu"):
        raise dims.fail("activation", repr(activation), 'None or "silu"')
    dims.fix("W-1", dims["W"] - 1, "weight")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Causal depthwise convolution along time, with the SiLU behind it fused in.

        a[t] = bias + sum over k of weight[k] x[t - (W-1) + k]      k = 0 .. W-1
        y[t] = a[t], or silu(a[t])

    The W-1 samples before the first are the state, zeros if None. Forward bits do not depend on how a sequence is
    split, packed or stepped.

    Args:
        x: [B, T, D], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`).
        weight: [D, W], W >= 1, any float dtype, read as float32; the last tap multiplies the current sample.
        bias: [D], any float dtype, read as float32.
        activation: None or "silu".
        state: [B, D, W-1] float32, oldest sample first; [S, D, W-1] with cu_seqlens.
        cu_seqlens: [S + 1] int32 or int64, from 0 to T, non-decreasing: S sequences packed into a batch of 1.
        return_state: also return the last W-1 samples.

    Returns:
        y [B, T, D] in x's dtype, or (y, state) with the new state in float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.

    Source: the short convolution of Mamba (Gu and Dao, 2023).
    """
    dims = Dims("causal_conv1d")
    _check(dims, x, "BTD", weight, bias, activation)
    dims.fix("S", dims["B"], "x")
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(x)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, ("S", "D", "W-1"), widths)
    dims.flag("return_state", return_state)
    if double:
        return reference.causal_conv1d(
            x, weight, bias, activation=activation, state=state, cu_seqlens=cu_seqlens, return_state=return_state
        )
    y, new_state = _OP.active.forward(x, weight, bias, state, cu_seqlens, activation is not None, return_state)
    return (y, new_state) if return_state else y


def causal_conv1d_step(
    state: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """One token of `causal_conv1d`: returns y and shifts x into `state`, in place.

    Args:
        state: [B, D, W-1] float32 or bfloat16, oldest sample first.
        x: [B, D], float32, bfloat16 or float16.
        weight: [D, W], as for `causal_conv1d`.
        bias: [D] or None.
        activation: None or "silu".

    Returns:
        y [B, D] in x's dtype, bit for bit that of `causal_conv1d` on a sequence of length 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.
    """
    dims = Dims("causal_conv1d_step")
    _check(dims, x, "BD", weight, bias, activation)
    double = is_float64(x)
    widths = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    dims.match("state", state, ("B", "D", "W-1"), widths)
    dims.in_place("state", state)
    refuse_gradient("causal_conv1d_step", (state, x, weight, bias))
    if double:
        return reference.causal_conv1d_step(state, x, weight, bias, activation=activation)
    return _OP.active.step(state, x, weight, bias, activation is not None)


_OP.function = causal_conv1d
_OP.step = causal_conv1d_step
_OP.time = ("x",)
_OP.packs = True
_OP.split_exact = True
_OP.float32 = ("weight", "bias")
