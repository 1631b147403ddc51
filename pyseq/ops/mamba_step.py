"""One token of a Mamba layer between its two large projections: contract. Kernels: csrc/mamba_step/."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import reference
from .._library import Kernel, define, refuse_gradient
from ._check import Dims, is_float64


def _fake(conv_state, state, x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, rms_eps):
    return x.new_empty(x.shape)


_OP = define(
    "mamba_step",
    step=Kernel(
        "(Tensor(a!) conv_state, Tensor(b!) state, Tensor x, Tensor z, Tensor conv_weight, Tensor? conv_bias, "
        "Tensor x_proj_weight, Tensor dt_proj_weight, Tensor dt_bias, Tensor A, Tensor D, float? rms_eps) -> Tensor",
        _fake,
    ),
)


def mamba_step(
    conv_state: torch.Tensor,
    state: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    *,
    rms_eps: float | None = None,
) -> torch.Tensor:
    r"""One token of a Mamba layer, all between its two large projections; both states are updated in place.

        u = silu(conv_bias + sum over k of conv_weight[k] s[k])     s: conv_state and x behind it, which then moves on
        [low, B, C] = W_x u
        dt = softplus(W_dt low + dt_bias)
        h = exp(dt A) h + dt B u
        y = (<C, h> + D u) silu(z)

    Nothing is rounded between x and y. On CUDA two launches, and weights are read in the dtype they have.

    Args:
        conv_state: [B, D, W-1] float32 or bfloat16, oldest sample first.
        state: [B, D, N] float32 or bfloat16, h.
        x, z: [B, D], float32, bfloat16 or float16 (float64, with float64 states, runs through `pyseq.reference`).
        conv_weight: [D, W], W >= 1; the last tap multiplies x.
        conv_bias: [D] or None.
        x_proj_weight: [R + 2 N, D], W_x. On CUDA R + 2 N is at most 6080.
        dt_proj_weight: [D, R], W_dt.
        dt_bias: [D].
        A: [D, N], real.
        D: [D].
        rms_eps: None is Mamba. A number is FalconMamba: low, B and C are each divided by sqrt(mean(v^2) + rms_eps).

    Weights and biases may have any float dtype and are read as float32.

    Returns:
        y [B, D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
        RuntimeError: grad mode is on and an input requires grad.

    Source: Gu and Dao, 2023 (Mamba); Zuo et al., 2024 (FalconMamba).
    """
    dims = Dims("mamba_step")
    dims.match("x", x, "BD")
    dims.match("z", z, "BD")
    dims.match("conv_weight", conv_weight, "DW")
    dims.optional("conv_bias", conv_bias, "D")
    dims.match("dt_proj_weight", dt_proj_weight, "DR")
    dims.match("dt_bias", dt_bias, "D")
    dims.match("A", A, "DN")
    dims.match("D", D, "D")
    for name, letter in (("conv_weight", "W"), ("dt_proj_weight", "R"), ("A", "N")):
        if dims[letter] == 0:
            raise dims.fail(name, f"of shape [D, {letter}] with {letter} = 0", f"{letter} >= 1")
    dims.fix("R + 2 N", dims["R"] + 2 * dims["N"], "dt_proj_weight and A")
    dims.match("x_proj_weight", x_proj_weight, ("R + 2 N", "D"))
    dims.fix("W-1", dims["W"] - 1, "conv_weight")
    double = is_float64(x)
    widths = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    for name, t, letters in (("conv_state", conv_state, ("B", "D", "W-1")), ("state", state, ("B", "D", "N"))):
        dims.match(name, t, letters, widths)
        dims.in_place(name, t)
    if rms_eps is not None:
        if isinstance(rms_eps, bool) or not isinstance(rms_eps, int | float):
            raise TypeError(f"mamba_step: rms_eps is {type(rms_eps).__name__}, expected a float or None")
        if not 0 <= rms_eps < math.inf:
            raise dims.fail("rms_eps", rms_eps, "a number >= 0")
    arguments = (conv_state, state, x, z, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    refuse_gradient("mamba_step", arguments, "use pyseq.Mamba, whose sequence form has one")
    if double:
        return reference.mamba_step(*arguments, rms_eps=rms_eps)
    return _OP.active.step(*arguments, rms_eps)


def _notes(arguments: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {'cast to float32' if t.dtype == torch.float64 else 'copied'} first, at each call"
        for name, t in arguments.items()
        if isinstance(t, torch.Tensor)
        and ((t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1) or t.dtype == torch.float64)
    ]


_OP.function = mamba_step
_OP.updates = ("conv_state", "state")
_OP.float32 = (
    "conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_bias", "A", "D",
)  # fmt: skip
_OP.notes = _notes
