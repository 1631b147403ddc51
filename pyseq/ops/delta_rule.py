"""Generalised delta rule, the recurrence of RWKV-7, and what is a case of it: contract and gradient.

Kernels: csrc/delta_rule/.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64, readable

KEEP = 64    # tokens between two kept states; kDeltaKeep of csrc/delta_rule/kernel.h
WIDEST = 256   # of K and of V
BY_SHAPE, SEQUENTIAL, CHUNKS = 0, 1, 2   # which form computes; DeltaForm of csrc/delta_rule/kernel.h
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? a, Tensor? b, Tensor? g"


def slots(batch: int, time: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many states are kept for the gradient: one before every KEEP tokens of each sequence."""
    if cu_seqlens is None:
        return batch * ((time + KEEP - 1) // KEEP)
    return time // KEEP + cu_seqlens.shape[0] - 1


def _forward_fake(q, k, v, a, b, g, state, cu_seqlens, scale, return_state, keep, form):
    batch, time, heads, keys = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    held = (heads, keys, v.shape[-1])
    last = (sequences, *held) if return_state else (0,)
    kept = (slots(batch, time, cu_seqlens), *held) if keep else (0,)
    y = q.new_empty(v.shape)
    return y, q.new_empty(last, dtype=torch.float32), q.new_empty(kept, dtype=torch.float32)


def _backward_fake(dy, dlast, q, k, v, a, b, g, state, cu_seqlens, kept, scale):
    def like(t):
        return q.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return tuple(like(t) for t in (q, k, v, a, b, g, state))


def _step_fake(state, q, k, v, a, b, g, scale):
    return q.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.return_state, _, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradient(kernels: Any, ctx: Any, dy: Any, dlast: Any, _: Any) -> tuple:
    tensors = ctx.saved_tensors
    dlast = dlast if ctx.return_state else None   # without return_state it is that of a 0-element tensor
    if dy is None and dlast is None:
        return (None,) * 12
    grads = kernels.backward(dy, dlast, *tensors, ctx.scale)
    given = tensors[:7]
    return *(g if t is not None else None for g, t in zip(grads, given, strict=True)), *(None,) * 5


_OP = define(
    "delta_rule",
    forward=Kernel(
        f"({_ARGUMENTS}, Tensor? state, Tensor? cu_seqlens, float scale, bool return_state, bool keep, int form) "
        "-> (Tensor y, Tensor last, Tensor kept)",
        _forward_fake,
    ),
    backward=Kernel(
        f"(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, Tensor? state, Tensor? cu_seqlens, Tensor kept, float scale) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dg, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel(f"(Tensor(a!) state, {_ARGUMENTS}, float scale) -> Tensor y", _step_fake),
    save=_save,
    gradient=_gradient,
)


def check_scale(dims: Dims, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"{dims.op}: scale is {type(scale).__name__}, expected a number")
    return float(scale)


def check_widths(dims: Dims, keys: str, values: str) -> None:
    for letter, name in (("K", keys), ("V", values)):
        if not 1 <= dims[letter] <= WIDEST:
            raise dims.fail(name, f"of width {letter} = {dims[letter]}", f"{letter} from 1 to {WIDEST}")


def check_decay(dims: Dims, name: str, g: torch.Tensor | None) -> None:
    """No log decay is above 0: read in eager mode and on a CPU. Elsewhere the kernels answer it with NaN."""
    if g is not None and g.numel() and readable(g) and bool(g.detach().max() > 0):
        raise dims.fail(name, f"{float(g.detach().max()):g} at most", f"{name} <= 0: it is the logarithm of a decay")


def decays(g: torch.Tensor | None) -> torch.Tensor | None:
    """For the reference, which takes any g: NaN where the kernels would answer with it."""
    return g if g is None or readable(g) else torch.where(g <= 0, g, float("nan"))


def _match(
    op: str, time: str, q: Any, k: Any, v: Any, a: Any, b: Any, g: Any, names: tuple[str, str] = ("q", "g")
) -> Dims:
    """Shapes, dtypes and devices of what the sequence (time "T") and the step (time "") share."""
    dims = Dims(op)
    dims.match(names[0], q, f"B{time}HK")
    dims.match("k", k, f"B{time}HK")
    dims.match("v", v, f"B{time}HV")
    check_widths(dims, names[0], "v")
    if (a is None) != (b is None):
        raise dims.fail(*(("a", "None", "a tensor, as b is") if a is None else ("b", "None", "a tensor, as a is")))
    dims.optional("a", a, f"B{time}HK")
    dims.optional("b", b, f"B{time}HK")
    one = isinstance(g, torch.Tensor) and g.dim() == len(time) + 2
    dims.optional(names[1], g, f"B{time}H" if one else f"B{time}HK")
    check_decay(dims, names[1], g)
    return dims


def _sequence(dims, q, k, v, a, b, g, scale, state, cu_seqlens, return_state, exact):
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(q, k, v, a, b, g)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, "BHKV" if cu_seqlens is None else "SHKV", widths)
    dims.flag("return_state", return_state)
    dims.flag("exact", exact)
    scale = check_scale(dims, scale)
    if double:
        return reference.delta_rule(
            q, k, v, a, b, decays(g), scale=scale, state=state, cu_seqlens=cu_seqlens, return_state=return_state
        )
    given = (q, k, v, a, b, g, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    form = SEQUENTIAL if exact else BY_SHAPE
    y, last, _ = _OP.active.forward(*given, cu_seqlens, scale, return_state, keep, form)
    return (y, last) if return_state else y


def _one_token(dims, state, q, k, v, a, b, g, scale):
    double = is_float64(q, k, v, a, b, g)
    dims.match("state", state, "BHKV", (torch.float64,) if double else (torch.float32, torch.bfloat16))
    dims.in_place("state", state)
    scale = check_scale(dims, scale)
    refuse_gradient(dims.op, (state, q, k, v, a, b, g))
    if double:
        return reference.delta_rule_step(state, q, k, v, a, b, decays(g), scale=scale)
    return _OP.active.step(state, q, k, v, a, b, g, scale)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    g: torch.Tensor | None,
    *,
    scale: float = 1.0,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The generalised delta rule, one recurrence for RWKV-7, GLA, RetNet, linear attention and DeltaNet.

        p[t] = S[t-1]^T a[t]
        S[t] = diag(exp(g[t])) S[t-1] + b[t] p[t]^T + k[t] v[t]^T
        y[t] = scale S[t]^T q[t]

    per head, with a state S of K x V. The correction p reads the state before it decays. Which kernel computes follows
    from what is given: without a and b nothing is corrected (linear attention, GLA), g [B, T, H] is one decay per
    head (RetNet), without g nothing decays. Where b = k and a = -beta exp(g) k, `gated_delta_rule` is faster.

    Args:
        q, k: [B, T, H, K], K from 1 to 256; float32, bfloat16 or float16 (float64 runs through `pyseq.reference`), as
            are all tensors but the state.
        v: [B, T, H, V], V from 1 to 256.
        a, b: [B, T, H, K], or both None.
        g: [B, T, H, K], [B, T, H] or None: the natural logarithm of the decay, <= 0; -inf forgets. No decay is ever
            divided by, so it may be as strong as it likes.
        scale: multiplies y.
        state: [B, H, K, V] float32, S before the first token; None starts from zeros.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: packs S sequences into a batch of 1; states are [S, H, K, V].
        return_state: also return S after the last token.
        exact: token by token in float32, bit for bit what `delta_rule_step` gives one by one on a CPU. Otherwise the
            kernel takes the faster of that and chunks of tokens, by shape.

    Returns:
        y [B, T, H, V] in q's dtype; with return_state, (y, state).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value. Where values are not
        read, on CUDA and in compiled calls, a head with g > 0 is NaN from that token on.

    Source: Peng et al., 2025 (RWKV-7); Yang et al., 2024 (DeltaNet in chunks).
    """
    dims = _match("delta_rule", "T", q, k, v, a, b, g)
    return _sequence(dims, q, k, v, a, b, g, scale, state, cu_seqlens, return_state, exact)


def delta_rule_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    g: torch.Tensor | None,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """One token of `delta_rule`: updates state in place, returns y; on a CPU equal to `exact=True` bit for bit.

    Args:
        state: [B, H, K, V], float32 or bfloat16 (advanced in float32 and rounded once, at every token: what decays or
            is corrected by less than 2^-9 of itself rounds back to what it was).
        q, k, a, b: [B, H, K].
        v: [B, H, V].
        g: [B, H, K], [B, H] or None.

    Returns:
        y [B, H, V] in q's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.
    """
    dims = _match("delta_rule_step", "", q, k, v, a, b, g)
    return _one_token(dims, state, q, k, v, a, b, g, scale)


def rwkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""RWKV-7's recurrence: `delta_rule` with q = r and g = w.

        S[t] = diag(exp(w[t])) S[t-1] + b[t] (S[t-1]^T a[t])^T + k[t] v[t]^T,   y[t] = scale S[t]^T r[t]

    w is the log decay, -exp(-0.5) sigmoid(.) in the model, not the raw output of its layer; a = -kappa, b = kappa alpha
    with kappa of unit length. Shapes, dtypes, errors: those of `delta_rule`.

    Source: Peng et al., 2025 (RWKV-7).
    """
    dims = _match("rwkv7", "T", r, k, v, a, b, w, ("r", "w"))
    return _sequence(dims, r, k, v, a, b, w, scale, state, cu_seqlens, return_state, exact)


def rwkv7_step(
    state: torch.Tensor,
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """One token of `rwkv7`: `delta_rule_step` with q = r and g = w, of shapes [B, H, K]."""
    dims = _match("rwkv7_step", "", r, k, v, a, b, w, ("r", "w"))
    return _one_token(dims, state, r, k, v, a, b, w, scale)


def _key_scale(q: Any, scale: Any) -> Any:
    return q.shape[-1] ** -0.5 if scale is None and isinstance(q, torch.Tensor) and q.dim() and q.shape[-1] else scale


def gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Gated linear attention: `delta_rule` without a correction.

        S[t] = diag(exp(g[t])) S[t-1] + k[t] v[t]^T,   y[t] = scale S[t]^T q[t]

    scale None is K ** -0.5. g [B, T, H, K] is GLA's, [B, T, H] RetNet's or a scalar gate, None linear attention.
    Shapes, dtypes, errors: those of `delta_rule`.

    Source: Yang et al., 2024 (GLA); Sun et al., 2023 (RetNet).
    """
    dims = _match("gla", "T", q, k, v, None, None, g)
    return _sequence(
        dims, q, k, v, None, None, g, _key_scale(q, scale), state, cu_seqlens, return_state, exact
    )


def gla_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """One token of `gla`: `delta_rule_step` without a correction, scale None being K ** -0.5."""
    dims = _match("gla_step", "", q, k, v, None, None, g)
    return _one_token(dims, state, q, k, v, None, None, g, _key_scale(q, scale))


_OP.function = delta_rule
_OP.step = delta_rule_step
_OP.time = ("q", "k", "v", "a", "b", "g")
_OP.packs = True
_OP.operands = ("q", "k", "v", "a", "b")
_OP.products = torch.bfloat16
