"""Kimi Delta Attention: a delta rule with one decay per key channel (Kimi Team, 2025)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from pyseq.layers.delta_heads import DeltaHeads
from pyseq.layers.gated_delta_net import sigmoid_gated
from pyseq.layers.linear import Linear

Tensor = torch.Tensor


class KimiDeltaAttention(DeltaHeads):
    """q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x));   q, k of unit length per head
    g = -exp(A_log) softplus(f + dt_bias),   f = W_f2 W_f1 x   per value head and key channel
    g = lower_bound sigmoid(exp(A_log) (f + dt_bias))          with lower_bound
    beta = sigmoid(W_b x), twice that with allow_neg_eigval
    R[t] = diag(exp(g[t])) S[t-1],   S[t] = R[t] + k (beta (v - R[t]^T k))^T,   y = K^-1/2 S^T q
    out = W_o [norm(y) sigmoid(W_g2 W_g1 x + bias)]

    x, out: [B, T, hidden_size]. num_heads heads of K = head_dim key channels; num_v_heads (None: as many) heads of
    V = head_dim * expand_v value channels, a multiple, which share the queries and keys. W_f1 and W_g1 give V channels.

    lower_bound: no log decay is below it. safe_gate wants one, and starts A_log from 0; here it buys no speed, as no
    kernel needs a bounded gate. The other arguments are those of `GatedDeltaNet`. A_log, dt_bias and o_norm.weight stay
    float32 when the layer is cast to a half type; g and beta are float32. Arguments and parameters have the names of
    fla's layer, so that its weights load. `mode` is accepted and changes nothing.
    """

    safe_gate: bool

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv, allow_neg_eigval,
            conv_size, conv_bias, layer_idx, norm_eps, head_dim, device, dtype, safe_gate=safe_gate,
        )  # fmt: skip
        if lower_bound is not None and (
            isinstance(lower_bound, bool) or not isinstance(lower_bound, int | float)
            or not -math.inf < lower_bound < 0
        ):  # fmt: skip
            raise ValueError(f"lower_bound must be None or a number below 0, got {lower_bound!r}")
        if safe_gate and lower_bound is None:
            raise ValueError("lower_bound must be given with safe_gate, got None")
        self.lower_bound = lower_bound
        first, gates = self.head_v_dim, self.num_v_heads * self.head_k_dim
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.f_proj = torch.nn.Sequential(
            Linear(hidden_size, first, bias=False, **kind), Linear(first, gates, bias=False, **kind)
        )
        self.g_proj = torch.nn.Sequential(
            Linear(hidden_size, first, bias=False, **kind), Linear(first, self.value_dim, **kind)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the decays; the projections and the convolutions keep torch's own initialisation."""
        self._draw(1, 16)
        if self.safe_gate:
            torch.nn.init.zeros_(self.A_log)

    def decay(self, x: Tensor) -> Tensor:
        """g [..., HV, K], the logarithm of the decay, float32."""
        f = (self.f_proj(x).to(self.A_log.dtype) + self.dt_bias).unflatten(-1, (self.num_v_heads, self.head_k_dim))
        A = torch.exp(self.A_log)[:, None]
        return -A * F.softplus(f) if self.lower_bound is None else self.lower_bound * torch.sigmoid(A * f)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        return sigmoid_gated(self.o_norm, y, self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim)))
