"""Inputs of the ops in pyseq's layout, and the shapes at which peers are compared."""

from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

SHAPES = {"A": (1, 2048, 1536, 16), "B": (4, 1024, 512, 16)}  # batch, time, channels, state


@dataclass(frozen=True)
class Scan:
    """y = (<C, h> + D u) silu(z), h = exp(dt A) h + dt B u, dt = softplus(dt + dt_bias)."""

    u: Tensor  # [B, T, D]
    dt: Tensor  # [B, T, D]
    A: Tensor  # [D, N]
    B: Tensor  # [B, T, N]
    C: Tensor  # [B, T, N]
    D: Tensor  # [D]
    z: Tensor  # [B, T, D]
    dt_bias: Tensor  # [D]
    dy: Tensor  # [B, T, D], the gradient that the backward pass starts from


@dataclass(frozen=True)
class Conv:
    """y[t] = silu(sum_k weight[k] x[t - W + 1 + k] + bias)."""

    x: Tensor  # [B, T, D]
    weight: Tensor  # [D, W]
    bias: Tensor  # [D]
    dy: Tensor  # [B, T, D]


T = TypeVar("T", Scan, Conv)


def scan(batch: int, time: int, channels: int, state: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Scan:
    """Inputs with the magnitudes of a Mamba layer at initialisation: A = -(1..N), softplus(dt) in 0.001..0.1.

    A, D and dt_bias are float32 whatever `dtype` is, as they are in a model.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    step = torch.exp(torch.empty(channels).uniform_(-6.9, -2.3, generator=g))
    return Scan(
        u=normal(batch, time, channels).to(dtype),
        dt=(0.5 * normal(batch, time, channels)).to(dtype),
        A=-torch.arange(1.0, state + 1).repeat(channels, 1),
        B=normal(batch, time, state).to(dtype),
        C=normal(batch, time, state).to(dtype),
        D=normal(channels),
        z=normal(batch, time, channels).to(dtype),
        dt_bias=step + torch.log(-torch.expm1(-step)),
        dy=normal(batch, time, channels).to(dtype),
    )


def conv(
    batch: int, time: int, channels: int, width: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Conv:
    """Inputs of unit variance; weight and bias are float32 whatever `dtype` is."""
    g = torch.Generator().manual_seed(seed)
    return Conv(
        x=torch.randn(batch, time, channels, generator=g).to(dtype),
        weight=torch.randn(channels, width, generator=g) / width**0.5,
        bias=torch.randn(channels, generator=g),
        dy=torch.randn(batch, time, channels, generator=g).to(dtype),
    )


def double(x: T) -> T:
    """The same numbers in float64."""
    return type(x)(**{f.name: getattr(x, f.name).double() for f in fields(x)})
