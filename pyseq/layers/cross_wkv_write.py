"""What a token of either stream of CrossWKV does to the state."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear
from pyseq.layers.rwkv7_start import Place, orthogonal, stretch
from pyseq.layers.rwkv7_time import STRONGEST
from pyseq.layers.token_shift import token_shift

Tensor = torch.Tensor


class Writes(NamedTuple):
    """The arguments of `rwkv7` behind r, [..., H, N] each."""

    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class CrossWriter(Exact):
    """x_m = x + (x_before - x) mix_m,   m in w, k, v, a
    k = W_k x_k;   v = W_v x_v
    log w = -exp(-1/2) sigmoid(w0 + w2 tanh(w1 x_w));   alpha = sigmoid(a0 + a2 a1 x_a)
    kappa = normalised(k k_k), k = k (1 + (alpha - 1) k_a)    per head
    a = -kappa, b = iclr_scale alpha kappa

    x [B, T, size], d_model channels written in heads of head_size. The vectors stay float32 in a half type.
    """

    exact = ("mix", "w0", "a0", "k_k", "k_a")
    w1: Linear
    w2: Linear
    a1: Linear
    a2: Linear
    mix: torch.nn.Parameter
    w0: torch.nn.Parameter
    a0: torch.nn.Parameter
    k_k: torch.nn.Parameter
    k_a: torch.nn.Parameter

    def __init__(
        self, size: int, d_model: int, head_size: int, decay_rank: int, iclr_rank: int, iclr_scale: int,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.d_model, self.iclr_scale = size, d_model, iclr_scale
        self.heads = (d_model // head_size, head_size)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.key = Linear(size, d_model, bias=False, **kind)
        self.value = Linear(size, d_model, bias=False, **kind)
        for letter, rank in (("w", decay_rank), ("a", iclr_rank)):
            setattr(self, f"{letter}1", Linear(size, rank, bias=False, **kind))
            setattr(self, f"{letter}2", Linear(rank, d_model, bias=False, **kind))
        shapes = dict.fromkeys(("w0", "a0", "k_k", "k_a"), (d_model,)) | {"mix": (4, size)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=exact_dtype(dtype))))
        for p in (self.mix, *(self.get_parameter(f"{m}{i}.weight") for m in "wa" for i in (1, 2))):
            p._no_weight_decay = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the time mix of a first RWKV-7 layer."""
        self.mix.copy_(Place(0, 1, self.size, self.size).mix()[1:5])
        vectors = Place(0, 1, self.d_model, self.heads[1]).vectors()
        for name in ("w0", "a0", "k_k"):
            self.get_parameter(name).copy_(vectors[name])
        self.get_parameter("k_a").fill_(1.02)
        for letter in "wa":
            self.get_parameter(f"{letter}1.weight").zero_()
            up = self.get_parameter(f"{letter}2.weight")
            orthogonal(up, 0.1 * stretch(up.shape[1], up.shape[0]))
        bound = 0.5 / math.sqrt(self.size)
        self.value.weight.uniform_(-bound, bound)
        self.key.weight.uniform_(-0.1 * bound, 0.1 * bound)

    def forward(self, x: Tensor, last: Tensor, mask: Tensor | None) -> tuple[Writes, Tensor]:
        """x [B, T, size], what came before it [B, size], mask [B, T] or None -> (what is written, the last x)."""
        x = x.to(self.mix.dtype)
        if mask is None:
            before, last = token_shift(x, last, None)
            return self.mixed(x, before), last
        before, last = _skipping(x, last.to(x.dtype), mask)
        writes = self.mixed(x, before)
        return Writes(*(t.masked_fill(~mask[..., None, None], 0) for t in writes)), last

    def mixed(self, x: Tensor, before: Tensor) -> Writes:
        """x and before [..., size], float32 or float64."""
        kind, wide = self.key.kind, self.mix.dtype
        x_w, x_k, x_v, x_a = (torch.addcmul(x, before - x, mix).to(kind) for mix in self.mix)
        k, v = self.key(x_k), self.value(x_v)
        w = torch.sigmoid(self.w0 + self.w2(torch.tanh(self.w1(x_w).to(wide)).to(kind))) * STRONGEST
        alpha = torch.sigmoid(self.a0 + self.a2(self.a1(x_a)))
        kappa = F.normalize((k * self.k_k).unflatten(-1, self.heads), dim=-1)
        replacement = (k + k * (alpha - 1) * self.k_a).to(k.dtype)
        w, replacement, v, alpha = (t.unflatten(-1, self.heads) for t in (w, replacement, v, alpha))
        return Writes(w, replacement, v, -kappa.to(k.dtype), (self.iclr_scale * alpha * kappa).to(k.dtype))


def _skipping(x: Tensor, last: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A token shift over the tokens where `mask` holds alone: what each has before it, and the last of them."""
    places = torch.arange(1, x.shape[1] + 1, device=x.device) * mask
    latest = torch.cat([places.new_zeros(len(x), 1), places], 1).cummax(1).values   # 0: none yet, that is `last`
    found = torch.cat([last[:, None], x], 1).gather(1, latest[..., None].expand(-1, -1, x.shape[-1]))
    return found[:, :-1], found[:, -1]
