"""One token of a Mamba-2 layer between its two large projections: contract. Kernels: csrc/mamba2_step/."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, is_float64, readable
from .ssd import _limits


def _fake(conv_state, state, z, xBC, *others):
    return xBC.new_empty(xBC.shape[0], state.shape[1] * state.shape[2])


_OP = define(
    "mamba2_step",
    step=Kernel(
        "(Tensor(a!) conv_state, Tensor(b!) state, Tensor? z, Tensor xBC, Tensor dt, Tensor conv_weight, "
        "Tensor? conv_bias, Tensor A, Tensor D, Tensor dt_bias, Tensor? norm_weight, float dt_low, float dt_high, "
        "float eps, int group_size, bool norm_before_gate) -> Tensor",
        _fake,
    ),
)


def _match(
    conv_state: Any, state: Any, z: Any, xBC: Any, dt: Any, conv_weight: Any, conv_bias: Any, A: Any, D: Any,
    dt_bias: Any, norm_weight: Any,
) -> Dims:  # fmt: skip
    """Shapes, dtypes and devices. C, the channels of the convolution, are H P + 2 G N."""
    dims = Dims("mamba2_step")
    dims.match("xBC", xBC, "BC")
    double = is_float64(xBC, *(t for t in (z, dt) if isinstance(t, torch.Tensor)))
    widths = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    dims.match("state", state, "BHPN", widths)
    dims.in_place("state", state)
    for letter in "HPN":
        if dims[letter] == 0:
            raise dims.fail("state", f"of shape [B, H, P, N] with {letter} = 0", f"{letter} >= 1")
    inner = dims["H"] * dims["P"]
    groups, rest = divmod(dims["C"] - inner, 2 * dims["N"])
    if rest or groups < 1 or dims["H"] % groups:
        raise dims.fail(
            "xBC", f"of {dims['C']} channels", f"H P + 2 G N with H P = {inner}, N = {dims['N']} and G, a divisor of H"
        )
    dims.fix("H P", inner, "state")
    dims.optional("z", z, ("B", "H P"))
    dims.match("dt", dt, "BH")
    dims.match("conv_weight", conv_weight, "CW")
    if dims["W"] == 0:
        raise dims.fail("conv_weight", "of width 0", "[C, W] with W >= 1")
    dims.fix("W-1", dims["W"] - 1, "conv_weight")
    dims.match("conv_state", conv_state, ("B", "C", "W-1"), widths)
    dims.in_place("conv_state", conv_state)
    dims.optional("conv_bias", conv_bias, "C")
    dims.match("A", A, "H")
    dims.match("D", D, "HP" if isinstance(D, torch.Tensor) and D.dim() == 2 else "H")
    dims.match("dt_bias", dt_bias, "H")
    dims.optional("norm_weight", norm_weight, ("H P",))
    if readable(A) and bool((A > 0).any()):
        raise dims.fail("A", f"{float(A.max()):g} at most", "A <= 0, as for ssd")
    return dims


def _check_options(dims: Dims, dt_limit: Any, eps: Any, group: Any, norm_before_gate: Any) -> tuple[float, float]:
    low, high = _limits(dims, dt_limit)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"mamba2_step: eps is {type(eps).__name__}, expected a float")
    if not eps >= 0:
        raise dims.fail("eps", eps, "a number >= 0")
    if isinstance(group, bool) or not isinstance(group, int):
        raise TypeError(f"mamba2_step: group_size is {type(group).__name__}, expected an int or None")
    if group < 1 or dims["H P"] % group:
        raise dims.fail("group_size", group, f"a divisor of H P = {dims['H P']}")
    dims.flag("norm_before_gate", norm_before_gate)
    return low, high


def mamba2_step(
    conv_state: torch.Tensor,
    state: torch.Tensor,
    z: torch.Tensor | None,
    xBC: torch.Tensor,
    dt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    r"""One token of a Mamba-2 layer, all between its two large projections; both states are updated in place.

        [x, B, C] = silu(conv_bias + sum over k of conv_weight[k] s[k])     s: conv_state and xBC behind it; it moves on
        delta = clamp(softplus(dt + dt_bias), *dt_limit)
        S = exp(delta A) S + delta x B^T
        v = S C + D x
        y = v silu(z)                                   without norm_weight
        y = norm_weight norm(v silu(z))                 or norm_weight norm(v) silu(z) with norm_before_gate
        norm(v) = v / sqrt(mean(v^2) + eps)             the mean over groups of `group_size` neighbouring channels

    Nothing is rounded between xBC and y. On CUDA two launches, and weights are read in the dtype they have.

    Args:
        conv_state: [B, H P + 2 G N, W-1] float32 or bfloat16, oldest sample first.
        state: [B, H, P, N] float32 or bfloat16, S. On CUDA N is at most 11776.
        z: [B, H P], or None for no gate.
        xBC: [B, H P + 2 G N], x, B and C before the convolution; G divides H. float32, bfloat16 or float16 (float64,
            with float64 states, runs through `pyseq.reference`), as are z and dt.
        dt: [B, H].
        conv_weight: [H P + 2 G N, W], W >= 1; the last tap multiplies xBC.
        conv_bias: [H P + 2 G N] or None.
        A: [H], <= 0. On a GPU, where values are not read, a head with another A becomes NaN.
        D: [H] or [H, P].
        dt_bias: [H].
        norm_weight: [H P], or None for no norm.
        dt_limit: the bounds of delta, 0 <= low <= high.
        eps: added to the mean square, >= 0.
        group_size: channels per mean; divides H P. None: all.
        norm_before_gate: normalise first, gate last.

    Weights and biases may have any float dtype and are read as float32.

    Returns:
        y [B, H P] in xBC's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.

    Source: Dao and Gu, 2024 (Mamba-2).
    """
    tensors = (conv_state, state, z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    dims = _match(*tensors)
    group = dims["H P"] if group_size is None else group_size
    low, high = _check_options(dims, dt_limit, eps, group, norm_before_gate)
    refuse_gradient("mamba2_step", tensors, "use pyseq.Mamba2, whose sequence form has one")
    if is_float64(xBC, z, dt):
        return reference.mamba2_step(
            *tensors, dt_limit=(low, high), eps=eps, group_size=group, norm_before_gate=norm_before_gate
        )
    return _OP.active.step(*tensors, low, high, eps, group, norm_before_gate)


def _notes(arguments: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {'cast to float32' if t.dtype == torch.float64 else 'copied'} first, at each call"
        for name, t in arguments.items()
        if isinstance(t, torch.Tensor)
        and ((t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1) or t.dtype == torch.float64)
    ]


_OP.function = mamba2_step
_OP.updates = ("conv_state", "state")
_OP.float32 = ("conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight")
_OP.notes = _notes
