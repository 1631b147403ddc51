"""mambapy 1.2.0 (MIT): Mamba in plain torch; `pscan` is a Blelloch scan over all states with a hand-written backward.

Timed: what `MambaBlock.ssm` and the gate after it do on a CPU: softplus of delta + bias, discretisation, `pscan`, the
product with C, D skip, silu(z) gate. Layout [B, T, D] throughout. The (B, T, D, N) temporaries that this makes are the
library's own way and are timed. Time should be a power of two, else it is padded.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import require
from .inputs import Scan


def _scan() -> Callable[..., Tensor]:
    pscan = require("mambapy.pscan", "mambapy").pscan

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        delta = F.softplus(dt + dt_bias)
        decay = torch.exp(delta.unsqueeze(-1) * A)
        entry = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        states = pscan(decay, entry)
        y = (states @ C.unsqueeze(-1)).squeeze(3) + D * u
        return y * F.silu(z)

    return scan


def selective_scan_forward(x: Scan) -> Callable[[], Tensor]:
    scan = _scan()

    @torch.no_grad()
    def call() -> Tensor:
        return scan(x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.dt_bias)

    return call


def selective_scan_forward_backward(x: Scan) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias."""
    scan = _scan()
    leaves = [t.clone().requires_grad_() for t in (x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.dt_bias)]
    return lambda: torch.autograd.grad(scan(*leaves), leaves, x.dy)
