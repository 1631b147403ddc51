"""State-space dual, the recurrence of Mamba-2: contract and gradient. Kernels: csrc/ssd/."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64, readable

CHUNKS = (16, 256)   # the shortest and longest chunk that the CPU kernels take
_ARGUMENTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
_STATE = "Tensor? state, Tensor? cu_seqlens"
_STEPS = "bool dt_softplus, float dt_low, float dt_high"


def _forward_fake(
    x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, dt_low, dt_high, return_state, exact, chunk
):
    batch, _, heads, width = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = (sequences, heads, width, B.shape[-1]) if return_state else (0,)
    return x.new_empty(x.shape), x.new_empty(last, dtype=torch.float32)


def _backward_fake(
    dy, dlast, x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, dt_low, dt_high, chunk
):
    def like(t):
        return x.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty(t.shape)

    return tuple(like(t) for t in (x, dt, A, B, C, D, z, dt_bias, state))


def _step_fake(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_low, dt_high):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softplus, low, high, ctx.return_state, _, chunk = inputs
    ctx.options = softplus, low, high, chunk
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradient(kernels: Any, ctx: Any, dy: Any, dlast: Any) -> tuple:
    tensors = ctx.saved_tensors
    dlast = dlast if ctx.return_state else None
    if dy is None and dlast is None:
        return (None,) * 16
    grads = kernels.backward(dy, dlast, *tensors, *ctx.options)
    given = tensors[:9]                                             # cu_seqlens has none
    found = (g if t is not None else None for g, t in zip(grads, given, strict=True))
    return *found, *(None,) * 7


_OP = define(
    "ssd",
    forward=Kernel(
        f"({_ARGUMENTS}, {_STATE}, {_STEPS}, bool return_state, bool exact, int chunk) -> (Tensor y, Tensor last)",
        _forward_fake,
    ),
    backward=Kernel(
        f"(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, {_STATE}, {_STEPS}, int chunk) -> (Tensor dx, Tensor ddt, "
        "Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel(f"(Tensor(a!) state, {_ARGUMENTS}, {_STEPS}) -> Tensor y", _step_fake),
    save=_save,
    gradient=_gradient,
)


def _match(op: str, time: str, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, dt_bias: Any) -> Dims:
    """Shapes, dtypes and devices of what the sequence (time "T") and the step (time "") share."""
    dims = Dims(op)
    dims.match("x", x, f"B{time}HP")
    dims.match("dt", dt, f"B{time}H")
    dims.match("A", A, "H")
    dims.match("B", B, f"B{time}GN")
    dims.match("C", C, f"B{time}GN")
    if dims["N"] == 0 or dims["P"] == 0:
        raise dims.fail(*(("B", "of width N = 0", "N >= 1") if dims["N"] == 0 else ("x", "of width P = 0", "P >= 1")))
    if dims["G"] == 0 or dims["H"] % dims["G"]:
        raise dims.fail("B", f"of G = {dims['G']} groups", f"G, a divisor of H = {dims['H']}")
    dims.optional("D", D, "HP" if isinstance(D, torch.Tensor) and D.dim() == 2 else "H")
    dims.optional("z", z, f"B{time}HP")
    dims.optional("dt_bias", dt_bias, "H")
    if readable(A) and bool((A > 0).any()):
        head = int((A > 0).nonzero()[0])
        raise dims.fail(
            "A", f"{float(A[head]):g} at head {head}",
            "A <= 0: products over a chunk overflow where a state grows. "
            f"pyseq.selective_scan{'' if time else '_step'} takes any A",
        )  # fmt: skip
    return dims


def _limits(dims: Dims, dt_limit: Any) -> tuple[float, float]:
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise TypeError(f"{dims.op}: dt_limit is {dt_limit!r}, expected two numbers (low, high)")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in dt_limit):
        raise TypeError(f"{dims.op}: dt_limit is {dt_limit!r}, expected two numbers (low, high)")
    low, high = float(dt_limit[0]), float(dt_limit[1])
    if not 0 <= low <= high or math.isinf(low):
        raise dims.fail("dt_limit", tuple(dt_limit), "0 <= low <= high: pyseq.selective_scan takes negative steps")
    return low, high


def _chunk(dims: Dims, chunk_size: Any) -> int:
    if chunk_size is None:
        return 0
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"{dims.op}: chunk_size is {type(chunk_size).__name__}, expected an integer or None")
    if not CHUNKS[0] <= chunk_size <= CHUNKS[1]:
        raise dims.fail("chunk_size", chunk_size, f"{CHUNKS[0]} to {CHUNKS[1]}")
    return chunk_size


def _decays(A: torch.Tensor) -> torch.Tensor:
    """For the reference, which takes any A: NaN where the kernels would answer with it."""
    return A if readable(A) else torch.where(A <= 0, A, math.nan)


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The structured state-space dual of Mamba-2, with softplus, bias, limits, skip and gate fused in.

        delta[t] = clamp(dt[t] + dt_bias, low, high)     softplus(dt[t] + dt_bias) with dt_softplus
        S[t] = exp(delta[t] A) S[t-1] + delta[t] x[t] B[t]^T
        y[t] = S[t] C[t] + D x[t]                        times silu(z[t]) where a gate is given

    per head h, with a state S of P x N and one decay; head h reads group h // (H / G) of B and C.

    Args:
        x: [B, T, H, P], float32, bfloat16 or float16 (float64 runs through `pyseq.reference`), as are dt, B, C and z.
        dt: [B, T, H], the step size before bias, softplus and limits.
        A: [H], any float dtype, read as float32; A <= 0.
        B, C: [B, T, G, N], G a divisor of H.
        D: [H] or [H, P], the skip.
        z: [B, T, H, P], the gate.
        dt_bias: [H].
        dt_softplus: softplus(v) is v above 20.
        dt_limit: (low, high), 0 <= low <= high. Where delta is cut off, dt and dt_bias have no gradient.
        state: [B, H, P, N] float32, S before the first token; None starts from zeros.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: packs S sequences into a batch of 1; states are [S, H, P, N].
        return_state: also return S after the last token.
        exact: token by token in float32, bit for bit what `ssd_step` gives one by one. Otherwise in chunks, by matrix
            products; where x, B and C are all bfloat16, the operands of those that end in y are rounded to bfloat16,
            and those that end in a state are not.
        chunk_size: tokens to a chunk, 16 to 256; None chooses. It changes rounding and speed and nothing else.
            Kernels on a GPU choose their own.

    Returns:
        y [B, T, H, P] in x's dtype; with return_state, (y, state).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value. Where values are not
        read, on CUDA and in compiled calls, a head with A > 0 is NaN.

    Source: Dao and Gu, 2024 (Mamba-2).
    """
    dims = _match("ssd", "T", x, dt, A, B, C, D, z, dt_bias)
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(x, dt, B, C, z)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, "BHPN" if cu_seqlens is None else "SHPN", widths)
    dims.flag("dt_softplus", dt_softplus)
    dims.flag("return_state", return_state)
    dims.flag("exact", exact)
    low, high = _limits(dims, dt_limit)
    chunk = _chunk(dims, chunk_size)
    if double:
        return reference.ssd(
            x, dt, _decays(A), B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=(low, high),
            state=state, cu_seqlens=cu_seqlens, return_state=return_state,
        )  # fmt: skip
    y, last = _OP.active.forward(
        x, dt, A, B, C, D, z, dt_bias, state, cu_seqlens, dt_softplus, low, high, return_state, exact, chunk
    )
    return (y, last) if return_state else y


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> torch.Tensor:
    """One token of `ssd`: updates state in place, returns y; on a CPU equal to `ssd(..., exact=True)` bit for bit.

    Args:
        state: [B, H, P, N], float32 or bfloat16 (advanced in float32 and rounded once). In bfloat16 what decays by less
            than 2^-9 a token, delta |A| < 0.002, rounds back to what it was: such a head never forgets. Use float32
            unless reading and writing the state is what bounds the step.
        x: [B, H, P], as is z.
        dt: [B, H].
        B, C: [B, G, N]. The other arguments are those of `ssd`.

    Returns:
        y [B, H, P] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.
    """
    dims = _match("ssd_step", "", x, dt, A, B, C, D, z, dt_bias)
    double = is_float64(x, dt, B, C, z)
    dims.match("state", state, "BHPN", (torch.float64,) if double else (torch.float32, torch.bfloat16))
    dims.in_place("state", state)
    dims.flag("dt_softplus", dt_softplus)
    low, high = _limits(dims, dt_limit)
    refuse_gradient("ssd_step", (state, x, dt, A, B, C, D, z, dt_bias))
    if double:
        return reference.ssd_step(
            state, x, dt, _decays(A), B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=(low, high)
        )
    return _OP.active.step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high)


_OP.function = ssd
_OP.step = ssd_step
_OP.time = ("x", "dt", "B", "C", "z")
_OP.packs = True
_OP.operands = ("x", "B", "C")
_OP.products = torch.bfloat16
_OP.float32 = ("A", "D", "dt_bias")
