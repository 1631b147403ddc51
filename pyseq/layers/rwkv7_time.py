"""The time mix of RWKV-7: token shift, low-rank gates, and the delta rule between two projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from pyseq._library import REGISTRY
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear
from pyseq.layers.norm import LayerNorm
from pyseq.layers.rwkv7_start import Place, orthogonal, stretch
from pyseq.layers.token_shift import token_shift
from pyseq.ops.delta_rule import rwkv7, rwkv7_step

Tensor = torch.Tensor
STRONGEST = -math.exp(-0.5)  # the log decay of a token lies between this and 0
SHORTEST = 1e-12  # a key below it is not stretched to unit length


class Mixed(NamedTuple):
    """What the recurrence takes, [..., H, N], and the gate and v_first, [..., D]."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor
    v_first: Tensor


class RWKV7TimeMix(Exact):
    """x_m = x + (x_before - x) mix_m,   m in r, w, k, v, a, g
    r = W_r x_r;   k = W_k x_k;   v = W_v x_v
    log w = -exp(-1/2) sigmoid(w0 + w2 tanh(w1 x_w))
    alpha = sigmoid(a0 + a2 a1 x_a);   g = g2 sigmoid(g1 x_g)
    v = v + (v_first - v) sigmoid(v0 + v2 v1 x_v)             but in the first layer, whose v is v_first
    kappa = normalised(k k_k), k = k (1 + (alpha - 1) k_a)    per head
    S[t] = (diag(w) - kappa (c alpha kappa)^T)^T S[t-1] + k v^T;   y = S[t]^T r     c = iclr_scale
    out = W_o (g (ln_x(y) + (sum over the head of r k r_k) v))

    x [B, T, D] in heads of N = head_size; ln_x normalises each head. All vectors, and ln_x, stay float32 when the
    layer is cast to a half type; w, alpha, the norms and the sums over a head are computed in float32.
    """

    receptance: Linear
    key: Linear
    value: Linear
    output: Linear
    w1: Linear
    w2: Linear
    a1: Linear
    a2: Linear
    v1: Linear
    v2: Linear
    g1: Linear
    g2: Linear
    mix: torch.nn.Parameter
    w0: torch.nn.Parameter
    a0: torch.nn.Parameter
    v0: torch.nn.Parameter
    k_k: torch.nn.Parameter
    k_a: torch.nn.Parameter
    r_k: torch.nn.Parameter

    def __init__(
        self,
        d_model: int,
        head_size: int,
        ranks: dict[str, int],
        *,
        place: Place,
        value_residual: bool,
        iclr_scale: int,
        norm_eps: float,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.head_size, self.heads = d_model, head_size, d_model // head_size
        self.value_residual, self.iclr_scale, self.place = value_residual, iclr_scale, place
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, Linear(d_model, d_model, bias=False, **kind))
        self.letters = "wavg" if value_residual else "wag"
        for letter in self.letters:
            setattr(self, f"{letter}1", Linear(d_model, ranks[letter], bias=False, **kind))
            setattr(self, f"{letter}2", Linear(ranks[letter], d_model, bias=False, **kind))
        shapes: dict[str, tuple[int, ...]] = {name: (d_model,) for name in ("w0", "a0", "k_k", "k_a")}
        shapes |= {"mix": (6, d_model), "r_k": (self.heads, head_size)}
        shapes |= {"v0": (d_model,)} if value_residual else {}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=exact_dtype(dtype))))
        self.exact = tuple(shapes)
        self.ln_x = LayerNorm(d_model, head_size * norm_eps, **kind)
        for p in (self.mix, self.r_k, *(self.get_parameter(f"{m}{i}.weight") for m in self.letters for i in (1, 2))):
            p._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The vectors by the layer's place in the model; W_o is zero, so that a layer begins as the identity."""
        self.mix.copy_(self.place.mix())
        for name, value in self.place.vectors().items():
            if name in self.exact:
                self.get_parameter(name).copy_(value)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for letter in self.letters:
            self.get_parameter(f"{letter}1.weight").zero_()
            up = self.get_parameter(f"{letter}2.weight")
            orthogonal(up, 0.1 * stretch(up.shape[1], up.shape[0]))
        bound = 0.5 / math.sqrt(self.d_model)
        self.receptance.weight.uniform_(-bound, bound)
        self.value.weight.uniform_(-bound, bound)
        self.key.weight.uniform_(-0.1 * bound, 0.1 * bound)
        self.output.weight.zero_()
        self.ln_x.weight.fill_(self.place.norm())
        self.ln_x.bias.zero_()

    def forward(
        self, x: Tensor, shift: Tensor | None, S: Tensor | None, cu_seqlens: Tensor | None, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D], what came before it [B, D], S [B, H, N, N] -> (out, the last x, S, v_first)."""
        before, shift = token_shift(x.to(self.w0.dtype), shift, cu_seqlens)
        mixed = self._mixed(self, x.to(self.w0.dtype), before, v_first)
        y, S = rwkv7(*mixed[:6], state=S, cu_seqlens=cu_seqlens, return_state=True)
        return self._merged(self, y, mixed), shift, S, mixed.v_first

    def step(self, x: Tensor, shift: Tensor, S: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, D], one token -> (out, v_first); `shift` and S are updated in place."""
        mixed = self._mixed(self, x.to(self.w0.dtype), shift, v_first)
        shift.copy_(x)
        return self._merged(self, rwkv7_step(S, *mixed[:6]), mixed), mixed.v_first

    def stepper(self, shift: Tensor, S: Tensor) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """`step` for a loop in inference mode, without the checks of the ops and the look-ups of a module."""
        names = ("receptance", "key", "value", "output", *(f"{m}{i}" for m in self.letters for i in (1, 2)))
        at = SimpleNamespace(**{name: getattr(self, name).stepper() for name in names})
        vars(at).update({name: self.get_parameter(name) for name in self.exact})
        at.ln_x, at.kind = self.ln_x, self.receptance.kind
        kernel = REGISTRY["delta_rule"].active.step

        def recur(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return kernel(S, r, k, v, a, b, w, 1.0)

        advance = partial(rwkv7_step, S) if self.w0.dtype == torch.float64 else recur

        def step(x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
            mixed = self._mixed(at, x, shift, v_first)
            shift.copy_(x)
            return self._merged(at, advance(*mixed[:6]), mixed), mixed.v_first

        return step

    @property
    def kind(self) -> torch.dtype:
        """The type of the matrices."""
        return self.receptance.kind

    def _mixed(self, at: Any, x: Tensor, before: Tensor, v_first: Tensor | None) -> Mixed:
        """x and before [..., D], float32 or float64; `at` has the parameters: this module, or what a stepper made."""
        kind, wide, heads = at.kind, x.dtype, (*x.shape[:-1], self.heads, self.head_size)
        mix = at.mix.view(6, *[1] * (x.dim() - 1), self.d_model)
        x_r, x_w, x_k, x_v, x_a, x_g = torch.addcmul(x, before - x, mix).to(kind).unbind(0)
        r, k, v = at.receptance(x_r), at.key(x_k), at.value(x_v)
        w = torch.sigmoid(at.w0 + at.w2(torch.tanh(at.w1(x_w).to(wide)).to(kind))) * STRONGEST
        alpha = torch.sigmoid(at.a0 + at.a2(at.a1(x_a)))
        gate = at.g2(torch.sigmoid(at.g1(x_g).to(wide)).to(kind))
        if v_first is None:
            v_first = v
        else:
            v = torch.addcmul(v, v_first - v, torch.sigmoid(at.v0 + at.v2(at.v1(x_v)))).to(v.dtype)
        kappa = (k * at.k_k).view(heads)
        kappa = kappa / torch.linalg.vector_norm(kappa, dim=-1, keepdim=True).clamp_min(SHORTEST)
        b = kappa * (alpha * -self.iclr_scale).view(heads)  # the minus of -kappa (alpha kappa)^T
        k = torch.addcmul(k, k, (alpha - 1) * at.k_a).to(r.dtype)
        return Mixed(
            r.view(heads), w.view(heads), k.view(heads), v.view(heads), kappa.to(r.dtype), b.to(r.dtype), gate, v_first
        )

    def _merged(self, at: Any, y: Tensor, mixed: Mixed) -> Tensor:
        """out, from y [..., H, N]."""
        wide, heads, norm = at.w0.dtype, (self.heads, self.head_size), at.ln_x
        o = torch.layer_norm(y.to(wide), heads[1:], None, None, norm.eps)
        o = torch.addcmul(norm.bias.view(heads), o, norm.weight.view(heads))
        o = torch.addcmul(o, (mixed.r * at.r_k * mixed.k).sum(-1, keepdim=True), mixed.v)
        return at.output((o.view(mixed.gate.shape) * mixed.gate).to(at.kind))
