"""Selective scan, the recurrence of Mamba: contract and gradient. Kernels: csrc/selective_scan/."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64

_CHUNK = 64   # tokens between two checkpoints of the state; kChunk of csrc/selective_scan/kernel.h
_ARGUMENTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
_STATE = "Tensor? state, Tensor? cu_seqlens"


def _forward_fake(u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, return_state, keep):
    batch, time, dim = u.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = (time - 1) // _CHUNK if time > 0 else 0
    last = (sequences, dim, A.shape[1]) if return_state else (0,)
    kept = (batch, chunks, dim, A.shape[1]) if keep else (0,)
    return u.new_empty(u.shape), u.new_empty(last, dtype=torch.float32), u.new_empty(kept, dtype=torch.float32)


def _backward_fake(dy, dlast, u, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, kept, dt_softplus):
    def like(t):
        return u.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    return tuple(like(t) for t in (u, dt, A, B, C, D, z, dt_bias, state))


def _step_fake(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return u.new_empty(u.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.dt_softplus, ctx.return_state, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradient(kernels: Any, ctx: Any, dy: Any, dlast: Any, _: Any) -> tuple:
    *tensors, kept = ctx.saved_tensors
    dlast = dlast if ctx.return_state else None
    if dy is None and dlast is None:
        return (None,) * 13
    grads = kernels.backward(dy, dlast, *tensors, kept, ctx.dt_softplus)
    given = (*tensors[:9], None)                             # cu_seqlens has none
    found = (g if t is not None else None for g, t in zip((*grads, None), given, strict=True))
    return *found, None, None, None


_OP = define(
    "selective_scan",
    forward=Kernel(
        f"({_ARGUMENTS}, {_STATE}, bool dt_softplus, bool return_state, bool keep) "
        "-> (Tensor y, Tensor last, Tensor kept)",
        _forward_fake,
    ),
    backward=Kernel(
        f"(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, {_STATE}, Tensor kept, bool dt_softplus) -> (Tensor du, "
        "Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel(f"(Tensor(a!) state, {_ARGUMENTS}, bool dt_softplus) -> Tensor y", _step_fake),
    save=_save,
    gradient=_gradient,
)


def _match(op: str, time: str, u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any) -> Dims:
    """Shapes, dtypes and devices of what the sequence (time "T") and the step (time "") share."""
    dims = Dims(op)
    rows = f"B{time}D"
    dims.match("u", u, rows)
    dims.match("dt", dt, rows)
    dims.match("A", A, "DN")
    if dims["N"] == 0:
        raise dims.fail("A", "of width N = 0", "[D, N] with N >= 1")
    for name, t in (("B", B), ("C", C)):
        grouped = isinstance(t, torch.Tensor) and t.dim() == len(rows) + 1
        if not grouped and dims.size.get("G", 1) == 1:
            dims.fix("G", 1, name)
        dims.match(name, t, f"B{time}GN" if grouped or dims["G"] != 1 else f"B{time}N")
    if dims["G"] == 0 or dims["D"] % dims["G"]:
        raise dims.fail("B", f"of G = {dims['G']} groups", f"G, a divisor of D = {dims['D']}")
    dims.optional("D", D, "D")
    dims.optional("z", z, rows)
    dims.optional("dt_bias", dt_bias, "D")
    return dims


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The selective scan of Mamba, with softplus, bias, skip and gate fused in.

        delta = dt + dt_bias                        softplus(dt + dt_bias) with dt_softplus
        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
        y[t] = <C[t], h[t]> + D u[t]                times silu(z[t]) where a gate is given

    per channel d, with N states each; channel d reads group d // (D / G) of B and C.

    Args:
        u: [B, T, D], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`), as are dt, B, C and z.
        dt: [B, T, D], the step size before bias and softplus.
        A: [D, N], any float dtype, read as float32. Positive values grow; nothing is clamped.
        B: [B, T, N] or [B, T, G, N], G a divisor of D.
        C: [B, T, N] or [B, T, G, N].
        D: [D], the skip.
        z: [B, T, D], the gate.
        dt_bias: [D].
        dt_softplus: delta = softplus(dt + dt_bias); softplus(v) is v above 20.
        state: [B, D, N] float32, h before the first token; None starts from zeros.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: packs S sequences into a batch of 1; then states are [S, D, N].
        return_state: also return h after the last token.

    Returns:
        y [B, T, D] in u's dtype; with return_state, (y, state).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.

    Source: Gu and Dao, 2023 (Mamba).
    """
    dims = _match("selective_scan", "T", u, dt, A, B, C, D, z, dt_bias)
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(u, dt, B, C, z)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, "BDN" if cu_seqlens is None else "SDN", widths)
    dims.flag("dt_softplus", dt_softplus)
    dims.flag("return_state", return_state)
    if double:
        return reference.selective_scan(
            u, dt, A, B, C, D, z, dt_bias,
            dt_softplus=dt_softplus, state=state, cu_seqlens=cu_seqlens, return_state=return_state,
        )
    tensors = (u, dt, A, B, C, D, z, dt_bias, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, last, _ = _OP.active.forward(*tensors, cu_seqlens, dt_softplus, return_state, keep)
    return (y, last) if return_state else y


def selective_scan_step(
    state: torch.Tensor,
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """One token of `selective_scan`: updates state in place, returns y; on a CPU equal to the sequence op bit for bit.

    Args:
        state: [B, D, N], float32 or bfloat16 (advanced in float32 and rounded once). In bfloat16 what decays by less
            than 2^-9 a token, delta |A| < 0.002, rounds back to what it was and is never forgotten. Use float32 unless
            reading and writing the state is what bounds the step.
        u: [B, D], as are dt and z.
        B: [B, N] or [B, G, N], as is C. The other arguments are those of `selective_scan`.

    Returns:
        y [B, D] in u's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
        RuntimeError: grad mode is on and an input requires grad.
    """
    dims = _match("selective_scan_step", "", u, dt, A, B, C, D, z, dt_bias)
    double = is_float64(u, dt, B, C, z)
    dims.match("state", state, "BDN", (torch.float64,) if double else (torch.float32, torch.bfloat16))
    dims.in_place("state", state)
    dims.flag("dt_softplus", dt_softplus)
    refuse_gradient("selective_scan_step", (state, u, dt, A, B, C, D, z, dt_bias))
    if double:
        return reference.selective_scan_step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
    return _OP.active.step(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus)


_OP.function = selective_scan
_OP.step = selective_scan_step
_OP.time = ("u", "dt", "B", "C", "z")
_OP.packs = True
_OP.split_exact = True
_OP.float32 = ("A", "D", "dt_bias")
