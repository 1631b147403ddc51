"""Exponential moving average, the smoothing of H-Net: contract and gradient. Kernels: csrc/ema/."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64

_CHUNK = 16   # tokens between two kept y; kEmaChunk of csrc/ema/kernel.h
_ARGUMENTS = "Tensor x, Tensor p, Tensor? state, Tensor? cu_seqlens"


def _forward_fake(x, p, state, cu_seqlens, return_state, keep):
    batch, time, dim = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = (time - 1) // _CHUNK if time > 0 else 0
    last = (sequences, dim) if return_state else (0,)
    kept = (batch, chunks, dim) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(last, dtype=torch.float32), x.new_empty(kept, dtype=torch.float32)


def _backward_fake(dy, dlast, x, p, state, cu_seqlens, kept):
    dstate = x.new_empty((0,) if state is None else state.shape, dtype=torch.float32)
    return x.new_empty(x.shape), p.new_empty(p.shape), dstate


def _step_fake(state, x, p):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.return_state, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradient(kernels: Any, ctx: Any, dy: Any, dlast: Any, _: Any) -> tuple:
    *tensors, kept = ctx.saved_tensors
    dlast = dlast if ctx.return_state else None   # without return_state it is that of a 0-element tensor
    if dy is None and dlast is None:
        return (None,) * 6
    dx, dp, dstate = kernels.backward(dy, dlast, *tensors, kept)
    return dx, dp, None if tensors[2] is None else dstate, None, None, None


_OP = define(
    "ema",
    forward=Kernel(
        f"({_ARGUMENTS}, bool return_state, bool keep) -> (Tensor y, Tensor last, Tensor kept)", _forward_fake
    ),
    backward=Kernel(
        f"(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, Tensor kept) -> (Tensor dx, Tensor dp, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel("(Tensor(a!) state, Tensor x, Tensor p) -> Tensor y", _step_fake),
    save=_save,
    gradient=_gradient,
)


def ema(
    x: torch.Tensor,
    p: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Exponential moving average whose weight is another at each token.

        y[t] = p[t] x[t] + (1 - p[t]) y[t-1]

    per channel. p is used as it is given: H-Net clamps it first, `p.float().clamp(1e-4, 1 - 1e-4)`, and then the
    gradient of p is that of torch's clamp. Outside of [0, 1] the formula holds as it stands, and y may grow.

    Args:
        x: [B, T, D], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`), as is p.
        p: [B, T], the weight of x[t].
        state: [B, D] float32, y before the first token; None starts from zeros.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: packs S sequences into a batch of 1; then states are [S, D].
        return_state: also return y after the last token, in float32.

    Returns:
        y [B, T, D] in x's dtype; with return_state, (y, state).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.

    Source: Hwang, Wang and Gu, 2025 (H-Net), the smoothing of its dechunking.
    """
    dims = Dims("ema")
    dims.match("x", x, "BTD")
    dims.match("p", p, "BT")
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(x, p)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, "BD" if cu_seqlens is None else "SD", widths)
    dims.flag("return_state", return_state)
    if double:
        return reference.ema(x, p, state=state, cu_seqlens=cu_seqlens, return_state=return_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, p, state))
    y, last, _ = _OP.active.forward(x, p, state, cu_seqlens, return_state, keep)
    return (y, last) if return_state else y


def ema_step(state: torch.Tensor, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """One token of `ema`: updates state in place, returns y; on a CPU equal to the sequence op bit for bit.

    Args:
        state: [B, D], float32 or bfloat16 (advanced in float32 and rounded once). In bfloat16 an average with
            p < 2^-9 (0.002) rounds back to what it was and never forgets. Use float32 unless reading and writing the
            state is what bounds the step.
        x: [B, D], float32, bfloat16 or float16.
        p: [B]. Where it is 0 the state stays, and y is the state.

    Returns:
        y [B, D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
        RuntimeError: grad mode is on and an input requires grad.
    """
    dims = Dims("ema_step")
    dims.match("x", x, "BD")
    dims.match("p", p, "B")
    double = is_float64(x, p)
    dims.match("state", state, "BD", (torch.float64,) if double else (torch.float32, torch.bfloat16))
    dims.in_place("state", state)
    refuse_gradient("ema_step", (state, x, p))
    if double:
        return reference.ema_step(state, x, p)
    return _OP.active.step(state, x, p)


_OP.function = ema
_OP.step = ema_step
_OP.time = ("x", "p")
_OP.packs = True
_OP.split_exact = True
