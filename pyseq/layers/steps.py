"""What the layers of the Mamba family share when they are made: their width, and the steps delta they begin with."""

from __future__ import annotations

import math
from typing import Any

import torch

# Between these a float32 holds a step, its logarithm and its inverse softplus.
LEAST, MOST = 1e-30, 1e30


def inner_width(d_model: int, expand: Any) -> int:
    """The channels between the projections, expand * d_model."""
    if not _number(expand) or not 0 < expand <= MOST:
        raise ValueError(f"expand must be a positive number, got {expand!r}")
    return int(expand * d_model)


def check_steps(dt_min: Any, dt_max: Any, floor: Any) -> None:
    if not _number(dt_min) or not _number(dt_max) or not LEAST <= dt_min <= dt_max <= MOST:
        raise ValueError(
            f"dt_min and dt_max must satisfy 0 < dt_min <= dt_max < inf, got {dt_min!r} and {dt_max!r} "
            f"({LEAST:g} to {MOST:g} are possible)"
        )
    if not _number(floor) or not 0 <= floor <= MOST:
        raise ValueError(f"dt_init_floor must be a number >= 0, got {floor!r}")


@torch.no_grad()
def draw_steps(bias: torch.Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Fills the bias of softplus such that steps are log-uniform in [dt_min, dt_max], at least `floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
