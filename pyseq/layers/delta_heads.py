"""What Gated DeltaNet and Kimi Delta Attention share: heads of a delta rule behind short convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear
from pyseq.layers.norm import GatedRMSNorm
from pyseq.layers.steps import draw_steps
from pyseq.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from pyseq.ops.delta_rule import WIDEST
from pyseq.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from pyseq.ops.rms_norm_gated import rms_norm_gated

Tensor = torch.Tensor
UNIT_EPS = 1e-6   # added to the sum of squares under the square root that gives q and k unit length
MODES = ("chunk", "fused_recurrent")


class DeltaState(NamedTuple):
    """What such a layer remembers of the past, float32. The first three: the last W - 1 inputs of the convolutions."""

    q: Tensor  # [B, H K, W-1], oldest first; width 0 without short convolutions
    k: Tensor  # [B, H K, W-1]
    v: Tensor  # [B, HV V, W-1]
    delta: Tensor  # [B, HV, K, V]


class DeltaHeads(Exact):
    """Sizes, projections, convolutions and the recurrence. A subclass makes the decay and applies the output gate.

    It gives `decay` (x -> g), `merge` (y, x -> what W_o multiplies) and calls `reset_parameters` when it is made.
    """

    exact = ("A_log", "dt_bias")
    hidden_size: int
    head_dim: int
    num_heads: int
    num_v_heads: int
    conv_size: int

    def __init__(
        self, hidden_size: int, expand_v: float, head_dim: int, num_heads: int, num_v_heads: int | None, mode: str,
        use_short_conv: bool, allow_neg_eigval: bool, conv_size: int, conv_bias: bool, layer_idx: int | None,
        norm_eps: float, steps_per_head: int, device: torch.device | str | None, dtype: torch.dtype | None,
        **flags: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        flags |= {"use_short_conv": use_short_conv, "allow_neg_eigval": allow_neg_eigval, "conv_bias": conv_bias}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
            setattr(self, name, flag)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if isinstance(norm_eps, bool) or not isinstance(norm_eps, int | float) or not 0 < norm_eps < math.inf:
            raise ValueError(f"norm_eps must be a positive number, got {norm_eps!r}")
        self._take_sizes(
            expand_v, hidden_size=hidden_size, head_dim=head_dim, num_heads=num_heads,
            num_v_heads=num_heads if num_v_heads is None else num_v_heads, conv_size=conv_size,
        )  # fmt: skip
        self.layer_idx = layer_idx

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        exact: dict[str, Any] = {"device": device, "dtype": exact_dtype(dtype)}
        self.widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
        for name, width in self.widths.items():
            setattr(self, f"{name}_proj", Linear(hidden_size, width, bias=False, **kind))
        self.b_proj = Linear(hidden_size, self.num_v_heads, bias=False, **kind)
        self.A_log = torch.nn.Parameter(torch.empty(self.num_v_heads, **exact))
        self.dt_bias = torch.nn.Parameter(torch.empty(self.num_v_heads * steps_per_head, **exact))
        if use_short_conv:
            for name, width in self.widths.items():
                conv = torch.nn.Conv1d(
                    width, width, conv_size, groups=width, padding=conv_size - 1, bias=conv_bias, **kind
                )
                setattr(self, f"{name}_conv1d", conv)
        self.o_norm = GatedRMSNorm(self.head_v_dim, norm_eps, norm_before_gate=True, **kind)
        self.o_proj = Linear(self.value_dim, hidden_size, bias=False, **kind)
        for p in (self.A_log, self.dt_bias):
            p._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_bias._no_reinit = True  # type: ignore[attr-defined]

    def _take_sizes(self, expand_v: Any, **sizes: Any) -> None:
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
            setattr(self, name, size)
        if self.head_dim > WIDEST:
            raise ValueError(f"head_dim must be at most {WIDEST}, got {self.head_dim}")
        if self.num_v_heads % self.num_heads:
            raise ValueError(f"num_v_heads must be a multiple of num_heads = {self.num_heads}, got {self.num_v_heads}")
        if isinstance(expand_v, bool) or not isinstance(expand_v, int | float) or not 0 < expand_v < math.inf:
            raise ValueError(f"expand_v must be a positive number, got {expand_v!r}")
        self.expand_v, self.head_k_dim, self.head_v_dim = expand_v, self.head_dim, round(self.head_dim * expand_v)
        if self.head_v_dim < 1 or not math.isclose(self.head_v_dim, self.head_dim * expand_v, rel_tol=1e-5):
            raise ValueError(f"expand_v must give a whole value width, head_dim * expand_v, got {expand_v!r}")
        self.key_dim, self.value_dim = self.num_heads * self.head_dim, self.num_v_heads * self.head_v_dim

    @torch.no_grad()
    def _draw(self, low: float, high: float) -> None:
        """The first decays: A uniform in (low, high), and steps as Mamba-2's."""
        self.A_log.uniform_(low, high).clamp_(min=2.0**-20).log_()
        draw_steps(self.dt_bias, 0.001, 0.1, 1e-4)

    def decay(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: DeltaState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DeltaState]:
        """x [B, T, hidden_size] -> (y, state after the last token). `state` is not changed; gradients flow through
        both."""
        self._check(x, 3)
        before = dict.fromkeys(DeltaState._fields) if state is None else DeltaState(*state)._asdict()
        mixed, after = {}, {}
        for name, width in self.widths.items():
            u = getattr(self, f"{name}_proj")(x)
            if self.use_short_conv:
                conv = getattr(self, f"{name}_conv1d")
                mixed[name], after[name] = causal_conv1d(
                    u, conv.weight.squeeze(1), conv.bias,
                    activation="silu", state=before[name], cu_seqlens=cu_seqlens, return_state=True,
                )  # fmt: skip
            else:
                sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
                mixed[name], after[name] = F.silu(u), self.A_log.new_zeros(sequences, width, 0)
        q, k, v = self._heads(**mixed)
        g, beta = self.decay(x), self._beta(x)
        parts = [
            gated_delta_rule(q, k, v, g, beta, state=S, cu_seqlens=cu_seqlens, return_state=True)
            for v, S in self._parts(v, before["delta"])
        ]
        y, delta = parts[0] if len(parts) == 1 else (torch.cat(t, -1) for t in zip(*parts, strict=True))
        return self.o_proj(self.merge(y, x).flatten(-2)), DeltaState(**after, delta=delta)

    def step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """x [B, hidden_size], one token -> (y, state). With grad mode off, `state` is updated in place and returned."""
        self._check(x, 2)
        if torch.is_grad_enabled():
            y, state = self(x[:, None], state)
            return y[:, 0], state
        mixed = {}
        for name in self.widths:
            u = getattr(self, f"{name}_proj")(x)
            if self.use_short_conv:
                conv = getattr(self, f"{name}_conv1d")
                past = getattr(state, name)
                mixed[name] = causal_conv1d_step(past, u, conv.weight.squeeze(1), conv.bias, activation="silu")
            else:
                mixed[name] = F.silu(u)
        q, k, v = self._heads(**mixed)
        g, beta = self.decay(x), self._beta(x)
        parts = [gated_delta_rule_step(S, q, k, v, g, beta) for v, S in self._parts(v, state.delta)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return self.o_proj(self.merge(y, x).flatten(-2)), state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DeltaState:
        """The state before the first token: zeros, on the layer's device, float32 unless the layer is float64.

        A state of dtype bfloat16 is for `step` alone: half the memory, and what it remembers is rounded at each token.
        """
        kind: dict[str, Any] = {"device": device or self.A_log.device, "dtype": dtype or self.A_log.dtype}
        past = self.conv_size - 1 if self.use_short_conv else 0
        convs = {name: torch.zeros(batch_size, width, past, **kind) for name, width in self.widths.items()}
        delta = torch.zeros(batch_size, self.num_v_heads, self.head_k_dim, self.head_v_dim, **kind)
        return DeltaState(**convs, delta=delta)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [..., H, K] of unit length, v [..., HV, V]."""
        q, k = (unit_length(u.unflatten(-1, (self.num_heads, self.head_k_dim))) for u in (q, k))
        return q, k, v.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _parts(self, v: Tensor, S: Tensor | None) -> Iterable[tuple[Tensor, Any]]:
        """Values and their state, as many channels at a time as the op takes: no channel depends on another."""
        if S is not None and S.shape[-1:] != v.shape[-1:]:
            raise ValueError(f"state.delta must end in head_v_dim = {self.head_v_dim}, got {list(S.shape)}")
        parts = v.split(WIDEST, -1)
        return zip(parts, [None] * len(parts) if S is None else S.split(WIDEST, -1), strict=True)

    def _beta(self, x: Tensor) -> Tensor:
        """The share of a memory that a token replaces, [..., HV] in float32: up to 2 with negative eigenvalues."""
        beta = torch.sigmoid(self.b_proj(x).to(self.A_log.dtype))
        return 2 * beta if self.allow_neg_eigval else beta

    def _check(self, x: Tensor, dim: int) -> None:
        if x.dim() != dim or x.shape[-1] != self.hidden_size:
            axes = "[B, T, hidden_size]" if dim == 3 else "[B, hidden_size]"
            raise ValueError(f"x must be {axes} with hidden_size = {self.hidden_size}, got {list(x.shape)}")

    def extra_repr(self) -> str:
        text = f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, num_v_heads={self.num_v_heads}"
        text = f"{text}, head_k_dim={self.head_k_dim}, head_v_dim={self.head_v_dim}"
        return f"{text}, allow_neg_eigval=True" if self.allow_neg_eigval else text


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(sum(x^2) + UNIT_EPS) over the last axis: an RMS norm of K channels with the weight K^-1/2."""
    width = x.shape[-1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = torch.full((width,), width**-0.5, dtype=dtype, device=x.device)
    return rms_norm_gated(x, weight, eps=UNIT_EPS / width)  # type: ignore[return-value]
