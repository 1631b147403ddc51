"""The loop that a torch user writes: 32 unrolled steps of the recurrence under torch.compile (torch, BSD-3-Clause).

Timed: a python loop over chunks of 32 steps; each chunk is one compiled function with softplus of dt + bias, D skip and
silu(z) gate inside, and the state is passed on. Compilation is not timed. Layout [B, T, D], state [B, D, N].

Backward: torch's own, through the compiled chunks. How a chunk is cut out matters more than the chunk: with
`x.split(32, 1)` the gradients of the chunks are concatenated once ("split"); with `x[:, t : t + 32]` each chunk's
gradient is padded with zeros to the whole sequence and added ("slice"). Both are what users write, so both are offered;
forward they are the same.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Scan

STEPS = 32


def _chunk(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor):  # type: ignore[no-untyped-def]
    dt = F.softplus(dt + dt_bias)
    dtu = dt * u
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + dtu[:, t, :, None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return ((torch.stack(ys, 1) + D * u) * F.silu(z)).to(u.dtype), h


def _cuts(x: Tensor, cut: str) -> Iterator[Tensor]:
    if cut == "split":
        return iter(x.split(STEPS, 1))
    return (x[:, t : t + STEPS] for t in range(0, x.shape[1], STEPS))


def _scan(cut: str) -> Callable[..., Tensor]:
    chunk = torch.compile(_chunk, dynamic=False, fullgraph=True)

    def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor) -> Tensor:
        h = A.new_zeros(u.shape[0], *A.shape)
        ys = []
        for cu, cdt, cB, cC, cz in zip(*(_cuts(x, cut) for x in (u, dt, B, C, z)), strict=True):
            y, h = chunk(h, cu, cdt, A, cB, cC, D, cz, dt_bias)
            ys.append(y)
        return torch.cat(ys, 1)

    return scan


def selective_scan_forward(x: Scan) -> Callable[[], Tensor]:
    scan = _scan("split")

    @torch.no_grad()
    def call() -> Tensor:
        return scan(x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.dt_bias)

    return call


def selective_scan_forward_backward(x: Scan, cut: str = "split") -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias."""
    scan = _scan(cut)
    leaves = [t.clone().requires_grad_() for t in (x.u, x.dt, x.A, x.B, x.C, x.D, x.z, x.dt_bias)]
    return lambda: torch.autograd.grad(scan(*leaves), leaves, x.dy)
