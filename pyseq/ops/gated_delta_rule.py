"""Gated delta rule, with DeltaNet and Kimi Delta Attention as cases of it: contract and gradient.

Kernels: csrc/gated_delta_rule/.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, check_cu_seqlens, is_float64
from .delta_rule import BY_SHAPE, SEQUENTIAL, check_decay, check_scale, check_widths, decays, slots

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor beta"


def _forward_fake(q, k, v, g, beta, state, cu_seqlens, scale, return_state, keep, form):
    batch, time, heads, values = v.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    held = (heads, q.shape[-1], values)
    last = (sequences, *held) if return_state else (0,)
    kept = (slots(batch, time, cu_seqlens), *held) if keep else (0,)
    y = q.new_empty(v.shape)
    return y, q.new_empty(last, dtype=torch.float32), q.new_empty(kept, dtype=torch.float32)


def _backward_fake(dy, dlast, q, k, v, g, beta, state, cu_seqlens, kept, scale):
    def like(t):
        return q.new_empty((0,)) if t is None else t.new_empty(t.shape)

    return tuple(like(t) for t in (q, k, v, g, beta, state))


def _step_fake(state, q, k, v, g, beta, scale):
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
        return (None,) * 11
    grads = kernels.backward(dy, dlast, *tensors, ctx.scale)
    given = tensors[:6]
    return *(g if t is not None else None for g, t in zip(grads, given, strict=True)), *(None,) * 5


_OP = define(
    "gated_delta_rule",
    forward=Kernel(
        f"({_ARGUMENTS}, Tensor? state, Tensor? cu_seqlens, float scale, bool return_state, bool keep, int form) "
        "-> (Tensor y, Tensor last, Tensor kept)",
        _forward_fake,
    ),
    backward=Kernel(
        f"(Tensor? dy, Tensor? dlast, {_ARGUMENTS}, Tensor? state, Tensor? cu_seqlens, Tensor kept, float scale) "
        "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dstate)",
        _backward_fake,
    ),
    step=Kernel(f"(Tensor(a!) state, {_ARGUMENTS}, float scale) -> Tensor y", _step_fake),
    save=_save,
    gradient=_gradient,
)


def _match(op: str, time: str, q: Any, k: Any, v: Any, g: Any, beta: Any, gate: tuple[str, ...]) -> Dims:
    """Shapes, dtypes and devices of what the sequence (time "T") and the step (time "") share."""
    dims = Dims(op)
    before = ("B", *time)
    dims.match("q", q, (*before, "H", "K"))
    dims.match("k", k, (*before, "H", "K"))
    dims.match("v", v, (*before, "HV", "V"))
    check_widths(dims, "q", "v")
    if dims["H"] == 0 or dims["HV"] % dims["H"]:
        raise dims.fail("v", f"of HV = {dims['HV']} heads", f"HV, a multiple of the H = {dims['H']} heads of q and k")
    dims.optional("g", g, (*before, *gate))
    dims.match("beta", beta, (*before, "HV"))
    check_decay(dims, "g", g)
    return dims


def _sequence(dims, q, k, v, g, beta, scale, state, cu_seqlens, return_state, exact):
    if cu_seqlens is not None:
        check_cu_seqlens(dims, cu_seqlens)
    double = is_float64(q, k, v, g, beta)
    widths = (torch.float32, torch.float64) if double else (torch.float32,)
    dims.optional("state", state, ("B" if cu_seqlens is None else "S", "HV", "K", "V"), widths)
    dims.flag("return_state", return_state)
    dims.flag("exact", exact)
    scale = dims["K"] ** -0.5 if scale is None else check_scale(dims, scale)
    if double:
        return reference.gated_delta_rule(
            q, k, v, decays(g), beta, scale=scale, state=state, cu_seqlens=cu_seqlens, return_state=return_state
        )
    given = (q, k, v, g, beta, state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    form = SEQUENTIAL if exact else BY_SHAPE
    y, last, _ = _OP.active.forward(*given, cu_seqlens, scale, return_state, keep, form)
    return (y, last) if return_state else y


def _one_token(dims, state, q, k, v, g, beta, scale):
    double = is_float64(q, k, v, g, beta)
    widths = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    dims.match("state", state, ("B", "HV", "K", "V"), widths)
    dims.in_place("state", state)
    scale = dims["K"] ** -0.5 if scale is None else check_scale(dims, scale)
    refuse_gradient(dims.op, (state, q, k, v, g, beta))
    if double:
        return reference.gated_delta_rule_step(state, q, k, v, decays(g), beta, scale=scale)
    return _OP.active.step(state, q, k, v, g, beta, scale)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The gated delta rule: what is stored under a key is replaced, by a share beta, after one decay per head.

        R[t] = exp(g[t]) S[t-1]
        S[t] = R[t] + k[t] (beta[t] (v[t] - R[t]^T k[t]))^T
        y[t] = scale S[t]^T q[t]

    per value head h, with a state S of K x V; it reads q and k of head h // (HV / H). k is used as it is given: the
    models give it unit length, and then the state stays bounded for beta from 0 to 2 (above 1 with negative
    eigenvalues). Equal to `delta_rule` with a = -beta exp(g) k, b = k and beta v, none of which is in memory.

    Args:
        q, k: [B, T, H, K], K from 1 to 256; float32, bfloat16 or float16 (float64 runs through `pyseq.reference`), as
            are v, g and beta.
        v: [B, T, HV, V], V from 1 to 256; HV is a multiple of H.
        g: [B, T, HV], the natural logarithm of the decay, <= 0; None or [B, T, HV, K] as `delta_net` and
            `kimi_delta_rule` have it.
        beta: [B, T, HV].
        scale: multiplies y; None is K ** -0.5.
        state: [B, HV, K, V] float32, S before the first token; None starts from zeros.
        cu_seqlens: int32 or int64 [S + 1], from 0 to T: packs S sequences into a batch of 1; states are [S, HV, K, V].
        return_state: also return S after the last token.
        exact: token by token in float32, bit for bit what the step gives one by one on a CPU. Otherwise the kernel
            takes the faster of that and chunks of tokens, by shape.

    Returns:
        y [B, T, HV, V] in q's dtype; with return_state, (y, state).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value. Where values are not
        read, on CUDA and in compiled calls, a head with g > 0 is NaN from that token on.

    Source: Yang, Kautz and Hatamizadeh, 2024 (Gated DeltaNet).
    """
    per_key = isinstance(g, torch.Tensor) and g.dim() == 4
    dims = _match("gated_delta_rule", "T", q, k, v, g, beta, ("HV", "K") if per_key else ("HV",))
    return _sequence(dims, q, k, v, g, beta, scale, state, cu_seqlens, return_state, exact)


def gated_delta_rule_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """One token of `gated_delta_rule`: updates state in place, returns y; on a CPU equal to `exact=True` bit for bit.

    Args:
        state: [B, HV, K, V], float32 or bfloat16 (advanced in float32 and rounded once, at every token: what changes
            by less than 2^-9 of itself rounds back to what it was).
        q, k: [B, H, K].
        v: [B, HV, V].
        g: [B, HV], [B, HV, K] or None.
        beta: [B, HV].

    Returns:
        y [B, HV, V] in q's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.
    """
    per_key = isinstance(g, torch.Tensor) and g.dim() == 3
    dims = _match("gated_delta_rule_step", "", q, k, v, g, beta, ("HV", "K") if per_key else ("HV",))
    return _one_token(dims, state, q, k, v, g, beta, scale)


def kimi_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""Kimi Delta Attention's recurrence: `gated_delta_rule` with one decay per key channel.

        R[t] = diag(exp(g[t])) S[t-1],   S[t] = R[t] + k[t] (beta[t] (v[t] - R[t]^T k[t]))^T,   y[t] = scale S[t]^T q[t]

    g: [B, T, HV, K], <= 0. The other arguments, results and errors are those of `gated_delta_rule`.

    Source: Kimi Team, 2025 (Kimi Linear).
    """
    dims = _match("kimi_delta_rule", "T", q, k, v, _required("kimi_delta_rule", g), beta, ("HV", "K"))
    return _sequence(dims, q, k, v, g, beta, scale, state, cu_seqlens, return_state, exact)


def kimi_delta_rule_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """One token of `kimi_delta_rule`: `gated_delta_rule_step` with g [B, HV, K]."""
    dims = _match("kimi_delta_rule_step", "", q, k, v, _required("kimi_delta_rule_step", g), beta, ("HV", "K"))
    return _one_token(dims, state, q, k, v, g, beta, scale)


def _required(op: str, g: Any) -> Any:
    if g is None:
        raise TypeError(f"{op}: g is None, expected a tensor; without a decay it is pyseq.delta_net")
    return g


def delta_net(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_state: bool = False,
    exact: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""DeltaNet's recurrence: `gated_delta_rule` without a decay.

        S[t] = S[t-1] + k[t] (beta[t] (v[t] - S[t-1]^T k[t]))^T,   y[t] = scale S[t]^T q[t]

    The arguments, results and errors are those of `gated_delta_rule`.

    Source: Yang et al., 2024 (DeltaNet).
    """
    dims = _match("delta_net", "T", q, k, v, None, beta, ())
    return _sequence(dims, q, k, v, None, beta, scale, state, cu_seqlens, return_state, exact)


def delta_net_step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """One token of `delta_net`: `gated_delta_rule_step` without a decay."""
    dims = _match("delta_net_step", "", q, k, v, None, beta, ())
    return _one_token(dims, state, q, k, v, None, beta, scale)


_OP.function = gated_delta_rule
_OP.step = gated_delta_rule_step
_OP.time = ("q", "k", "v", "g", "beta")
_OP.packs = True
_OP.operands = ("q", "k", "v")
_OP.products = torch.bfloat16
