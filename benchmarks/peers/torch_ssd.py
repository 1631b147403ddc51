"""The state-space dual with torch alone (torch, BSD-3-Clause), in the two forms that users write.

"listing": the four steps of the paper's listing (Dao and Gu, 2024) as einsums over chunks of 64, every state from one
product with the decays between all pairs of chunks; eager. Our own writing: mamba-ssm's file imports Triton.
"chunks": scores once for all heads, states of all heads in one product, a loop over chunks that carries the state, all
under torch.compile; compilation is not timed.

Both take one group, a length that is a multiple of the chunk, and pyseq's layout; softplus of dt + bias and the D skip
are inside.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Ssd

CHUNK = 64
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def _sums(a: Tensor) -> Tensor:
    """Sums of a over (j, i] for all pairs i >= j of its last axis, -inf elsewhere: added up, never subtracted."""
    length = a.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=a.device).tril()
    terms = a.unsqueeze(-1).expand(*a.shape, length).masked_fill(~lower.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~lower, -torch.inf)


def _listing(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    delta = F.softplus(dt + dt_bias)
    v, a, b, c = (t.unflatten(1, (-1, CHUNK)) for t in (x * delta.unsqueeze(-1), delta * A, B, C))
    a = a.permute(0, 3, 1, 2)                                   # [batch, head, chunk, token]
    whole = a.cumsum(-1)
    y = torch.einsum("zkign,zkjgn,zhkij,zkjhp->zkihp", c, b, _sums(a).exp(), v)
    added = torch.einsum("zkjgn,zhkj,zkjhp->zkghpn", b, (whole[..., -1:] - whole).exp(), v)
    added = torch.cat([torch.zeros_like(added[:, :1]), added], 1)
    between = _sums(F.pad(whole[..., -1], (1, 0))).exp()
    before = torch.einsum("zhkl,zlghpn->zkghpn", between, added)[:, :-1]
    y = y + torch.einsum("zkign,zkghpn,zhki->zkihp", c, before, whole.exp())
    return y.flatten(1, 2) + D.unsqueeze(-1) * x


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    heads, width = x.shape[2:]
    delta = F.softplus(dt + dt_bias)
    L = (delta * A).unflatten(1, (-1, CHUNK)).cumsum(2).transpose(2, 3)   # [batch, chunk, head, token]
    v = (x * delta.unsqueeze(-1)).unflatten(1, (-1, CHUNK)).transpose(2, 3)
    b, c = (t.squeeze(2).unflatten(1, (-1, CHUNK)) for t in (B, C))
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    decay = (L.unsqueeze(-1) - L.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    y = ((c @ b.transpose(-1, -2)).unsqueeze(2) * decay).to(x.dtype) @ v.to(x.dtype)
    weighted = v * (L[..., -1:] - L).exp().unsqueeze(-1)
    added = (weighted.to(x.dtype).transpose(-1, -2).flatten(2, 3) @ b).unflatten(2, (heads, width))
    S, before = torch.zeros_like(added[:, 0]), []
    for k, decays in enumerate(L[..., -1].exp().unbind(1)):
        before.append(S)
        S = decays[..., None, None] * S + added[:, k]
    carried = c @ torch.stack(before, 1).flatten(2, 3).to(x.dtype).transpose(-1, -2)
    y = y + carried.unflatten(-1, (heads, width)).transpose(2, 3) * L.exp().unsqueeze(-1)
    return (y.transpose(2, 3).reshape(x.shape) + D.unsqueeze(-1) * x).to(x.dtype)


def _form(compiled: bool) -> Callable[..., Tensor]:
    return torch.compile(_chunks, dynamic=False, fullgraph=True) if compiled else _listing


def ssd_forward(x: Ssd, compiled: bool) -> Callable[[], Tensor]:
    form, tensors = _form(compiled), [getattr(x, name) for name in NAMES]

    @torch.no_grad()
    def call() -> Tensor:
        return form(*tensors)

    return call


def ssd_forward_backward(x: Ssd, compiled: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients of x, dt, A, B, C, D, dt_bias."""
    form, leaves = _form(compiled), [getattr(x, name).clone().requires_grad_() for name in NAMES]
    return lambda: torch.autograd.grad(form(*leaves), leaves, x.dy)
