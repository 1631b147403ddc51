"""Inputs of the ops in pyseq's layout, and the shapes at which peers are compared."""

import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

SHAPES = {"A": (1, 2048, 1536, 16), "B": (4, 1024, 512, 16)}  # batch, time, channels, state
MAMBA2_130M = (1, 2048, 24, 64, 128, 1)  # batch, time, heads, width of a head, state, groups
RWKV7_190M = (1, 1024, 12, 64)  # batch, time, heads, width of a head
GATED_DELTA_NET = (1, 1024, 16, 128)  # the same


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


@dataclass(frozen=True)
class Norm:
    """y = weight * norm(x silu(z)), or weight * norm(x) * silu(z) where the norm comes first."""

    x: Tensor  # [B, T, D]
    weight: Tensor  # [D]
    z: Tensor  # [B, T, D]
    dy: Tensor  # [B, T, D]


@dataclass(frozen=True)
class ScanStep:
    """One token of Scan; the state is updated in place."""

    state: Tensor  # [B, D, N]
    u: Tensor  # [B, D]
    dt: Tensor  # [B, D]
    A: Tensor  # [D, N]
    B: Tensor  # [B, N]
    C: Tensor  # [B, N]
    D: Tensor  # [D]
    z: Tensor  # [B, D]
    dt_bias: Tensor  # [D]


@dataclass(frozen=True)
class ConvStep:
    """One token of Conv; the state, oldest sample first, is updated in place."""

    state: Tensor  # [B, D, W - 1]
    x: Tensor  # [B, D]
    weight: Tensor  # [D, W]
    bias: Tensor  # [D]


@dataclass(frozen=True)
class MambaStep:
    """One token of a Mamba layer between its large projections; both states are updated in place."""

    conv_state: Tensor  # [B, D, W - 1]
    state: Tensor  # [B, D, N]
    x: Tensor  # [B, D]
    z: Tensor  # [B, D]
    conv_weight: Tensor  # [D, W]
    conv_bias: Tensor  # [D]
    x_proj_weight: Tensor  # [R + 2 N, D]
    dt_proj_weight: Tensor  # [D, R]
    dt_bias: Tensor  # [D]
    A: Tensor  # [D, N]
    D: Tensor  # [D]


@dataclass(frozen=True)
class Mamba2Step:
    """One token of a Mamba-2 layer between its projections; both states are updated in place."""

    conv_state: Tensor  # [B, H P + 2 N, W - 1]
    state: Tensor  # [B, H, P, N]
    z: Tensor  # [B, H P]
    xBC: Tensor  # [B, H P + 2 N]
    dt: Tensor  # [B, H]
    conv_weight: Tensor  # [H P + 2 N, W]
    conv_bias: Tensor  # [H P + 2 N]
    A: Tensor  # [H]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]
    norm_weight: Tensor  # [H P]


@dataclass(frozen=True)
class Ssd:
    """y = S C + D x, S = exp(dt A) S + dt x B^T per head, dt = softplus(dt + dt_bias)."""

    x: Tensor  # [B, T, H, P]
    dt: Tensor  # [B, T, H]
    A: Tensor  # [H]
    B: Tensor  # [B, T, G, N]
    C: Tensor  # [B, T, G, N]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]
    dy: Tensor  # [B, T, H, P]


@dataclass(frozen=True)
class SsdStep:
    """One token of Ssd; the state is updated in place."""

    state: Tensor  # [B, H, P, N]
    x: Tensor  # [B, H, P]
    dt: Tensor  # [B, H]
    A: Tensor  # [H]
    B: Tensor  # [B, G, N]
    C: Tensor  # [B, G, N]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]


@dataclass(frozen=True)
class Ema:
    """y[t] = p[t] x[t] + (1 - p[t]) y[t-1]."""

    x: Tensor  # [B, T, D]
    p: Tensor  # [B, T]
    dy: Tensor  # [B, T, D]


@dataclass(frozen=True)
class EmaStep:
    """One token of Ema; the state is updated in place."""

    state: Tensor  # [B, D]
    x: Tensor  # [B, D]
    p: Tensor  # [B]


@dataclass(frozen=True)
class Delta:
    """S = diag(exp(g)) S + b (S^T a)^T + k v^T, y = S^T q per head, with RWKV-7's gates and corrections."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    a: Tensor  # [B, T, H, K]
    b: Tensor  # [B, T, H, K]
    g: Tensor  # [B, T, H, K]
    dy: Tensor  # [B, T, H, V]


@dataclass(frozen=True)
class GatedDelta:
    """R = exp(g) S, S = R + k (beta (v - R^T k))^T, y = K^-0.5 S^T q per head."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H]
    beta: Tensor  # [B, T, H]
    dy: Tensor  # [B, T, H, V]


T = TypeVar(
    "T", Scan, Conv, Norm, ScanStep, ConvStep, MambaStep, Ssd, SsdStep, Ema, EmaStep, Mamba2Step, Delta, GatedDelta
)


def scan(
    batch: int, time: int, channels: int, state: int, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> Scan:
    """Inputs with the magnitudes of a Mamba layer at initialisation: A = -(1..N), softplus(dt) in 0.001..0.1.

    A, D and dt_bias are float32 whatever `dtype` is, as they are in a model.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    step = torch.exp(torch.empty(channels, device=device).uniform_(-6.9, -2.3, generator=g))
    return Scan(
        u=normal(batch, time, channels).to(dtype),
        dt=(0.5 * normal(batch, time, channels)).to(dtype),
        A=-torch.arange(1.0, state + 1, device=device).repeat(channels, 1),
        B=normal(batch, time, state).to(dtype),
        C=normal(batch, time, state).to(dtype),
        D=normal(channels),
        z=normal(batch, time, channels).to(dtype),
        dt_bias=step + torch.log(-torch.expm1(-step)),
        dy=normal(batch, time, channels).to(dtype),
    )


def conv(
    batch: int, time: int, channels: int, width: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> Conv:
    """Inputs of unit variance; weight and bias are float32 whatever `dtype` is."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    return Conv(
        x=normal(batch, time, channels).to(dtype),
        weight=normal(channels, width) / width**0.5,
        bias=normal(channels),
        dy=normal(batch, time, channels).to(dtype),
    )


def norm(
    batch: int, time: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Norm:
    """Inputs of unit variance; the weight is float32 whatever `dtype` is."""
    g = torch.Generator(device).manual_seed(seed)
    x, z, dy = (torch.randn(batch, time, channels, generator=g, device=device).to(dtype) for _ in range(3))
    return Norm(x=x, weight=1 + 0.1 * torch.randn(channels, generator=g, device=device), z=z, dy=dy)


def scan_step(
    batch: int, channels: int, state: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> ScanStep:
    """The first token of `scan`, and a float32 state of unit variance."""
    x = scan(batch, 1, channels, state, dtype, seed, device)
    g = torch.Generator(device).manual_seed(seed + 1)
    u, dt, B, C, z = (t[:, 0].contiguous() for t in (x.u, x.dt, x.B, x.C, x.z))
    before = torch.randn(batch, channels, state, generator=g, device=device)
    return ScanStep(state=before, u=u, dt=dt, A=x.A, B=B, C=C, D=x.D, z=z, dt_bias=x.dt_bias)


def conv_step(
    batch: int, channels: int, width: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> ConvStep:
    """The last token of a `conv` of W tokens, whose others are the state."""
    x = conv(batch, width, channels, width, dtype, seed, device)
    before = x.x[:, :-1].float().transpose(1, 2).contiguous()
    return ConvStep(state=before, x=x.x[:, -1].contiguous(), weight=x.weight, bias=x.bias)


def mamba_step(
    batch: int, channels: int, state: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> MambaStep:
    """W 4, R D / 32. The weights of the projections have `dtype` too, as they have in a model."""
    g = torch.Generator(device).manual_seed(seed)
    scan = scan_step(batch, channels, state, dtype, seed, device)
    conv = conv_step(batch, channels, 4, dtype, seed, device)
    rank = max(1, channels // 32)

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=g, device=device) / columns**0.5).to(dtype)

    return MambaStep(
        conv_state=conv.state, state=scan.state, x=conv.x, z=scan.z, conv_weight=conv.weight, conv_bias=conv.bias,
        x_proj_weight=weight(rank + 2 * state, channels), dt_proj_weight=weight(channels, rank), dt_bias=scan.dt_bias,
        A=scan.A, D=scan.D,
    )


def delta(
    batch: int, time: int, heads: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> Delta:
    """K = V = width. a and b along a unit vector, by shares between 0 and 1; decays from 0.545 to 1; g is float32."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(batch, time, heads, width, generator=gen, device=device)

    unit = torch.nn.functional.normalize(normal(), dim=-1)
    q, k, v, dy = (t.to(dtype) for t in (normal(), normal() * width**-0.5, normal(), normal()))
    b = (unit * torch.sigmoid(normal())).to(dtype)
    return Delta(q=q, k=k, v=v, a=-unit.to(dtype), b=b, g=-math.exp(-0.5) * torch.sigmoid(normal()), dy=dy)


def gated_delta(
    batch: int, time: int, heads: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> GatedDelta:
    """K = V = width. q and k of unit length, beta between 0 and 1; g and beta are float32."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(batch, time, heads, *size, generator=gen, device=device)

    q, k = (torch.nn.functional.normalize(normal(width), dim=-1).to(dtype) for _ in range(2))
    g = -torch.nn.functional.softplus(normal() - 2)
    beta = torch.sigmoid(normal())
    return GatedDelta(q=q, k=k, v=normal(width).to(dtype), g=g, beta=beta, dy=normal(width).to(dtype))


def ssd(
    batch: int, time: int, heads: int, width: int, state: int, groups: int = 1, dtype: torch.dtype = torch.float32,
    seed: int = 0, device: str = "cpu",
) -> Ssd:
    """Inputs with the magnitudes of a Mamba-2 layer at initialisation: A in -16..-1, softplus(dt) in 0.001..0.1.

    A, D and dt_bias are float32 whatever `dtype` is, as they are in a model.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    step = torch.exp(torch.empty(heads, device=device).uniform_(-6.9, -2.3, generator=g))
    return Ssd(
        x=normal(batch, time, heads, width).to(dtype),
        dt=(0.5 * normal(batch, time, heads)).to(dtype),
        A=-torch.empty(heads, device=device).uniform_(1, 16, generator=g),
        B=normal(batch, time, groups, state).to(dtype),
        C=normal(batch, time, groups, state).to(dtype),
        D=normal(heads),
        dt_bias=step + torch.log(-torch.expm1(-step)),
        dy=normal(batch, time, heads, width).to(dtype),
    )


def ssd_step(
    batch: int, heads: int, width: int, state: int, groups: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> SsdStep:
    """The first token of `ssd`, and a float32 state of unit variance."""
    x = ssd(batch, 1, heads, width, state, groups, dtype, seed, device)
    g = torch.Generator(device).manual_seed(seed + 1)
    before = torch.randn(batch, heads, width, state, generator=g, device=device)
    token = {name: getattr(x, name)[:, 0].contiguous() for name in ("x", "dt", "B", "C")}
    return SsdStep(state=before, A=x.A, D=x.D, dt_bias=x.dt_bias, **token)


def mamba2_step(
    batch: int, heads: int, width: int, state: int, dtype: torch.dtype = torch.float32, seed: int = 0,
    device: str = "cpu",
) -> Mamba2Step:
    """One group, W 4."""
    x = ssd_step(batch, heads, width, state, 1, dtype, seed, device)
    conv = conv_step(batch, heads * width + 2 * state, 4, dtype, seed, device)
    g = torch.Generator(device).manual_seed(seed + 2)
    z = torch.randn(batch, heads * width, generator=g, device=device).to(dtype)
    return Mamba2Step(
        conv_state=conv.state, state=x.state, z=z, xBC=conv.x, dt=x.dt, conv_weight=conv.weight, conv_bias=conv.bias,
        A=x.A, D=x.D, dt_bias=x.dt_bias, norm_weight=torch.ones(heads * width, device=device),
    )


def ema(
    batch: int, time: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Ema:
    """p in (1e-4, 1 - 1e-4), as H-Net clamps it."""
    g = torch.Generator(device).manual_seed(seed)
    p = torch.rand(batch, time, generator=g, device=device)
    x, dy = (torch.randn(batch, time, channels, generator=g, device=device).to(dtype) for _ in range(2))
    return Ema(x=x, p=p.clamp(1e-4, 1 - 1e-4), dy=dy)


def ema_step(
    batch: int, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> EmaStep:
    """The first token of `ema`, and a float32 state of unit variance."""
    x = ema(batch, 1, channels, dtype, seed, device)
    g = torch.Generator(device).manual_seed(seed + 1)
    before = torch.randn(batch, channels, generator=g, device=device)
    return EmaStep(state=before, x=x.x[:, 0].contiguous(), p=x.p[:, 0].contiguous())


def double(x: T) -> T:
    """The same numbers in float64."""
    return type(x)(**{f.name: getattr(x, f.name).double() for f in fields(x)})
