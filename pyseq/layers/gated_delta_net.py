"""Gated DeltaNet: a delta rule with one decay per head (Yang, Kautz and Hatamizadeh, 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyseq.layers.delta_heads import DeltaHeads
from pyseq.layers.linear import Linear
from pyseq.layers.norm import GatedRMSNorm
from pyseq.ops.rms_norm_gated import rms_norm_gated

Tensor = torch.Tensor
GATES = ("swish", "silu", "sigmoid")


class GatedDeltaNet(DeltaHeads):
    """q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x));   q, k of unit length per head
    g = -exp(A_log) softplus(W_a x + dt_bias),   beta = sigmoid(W_b x), twice that with allow_neg_eigval
    R[t] = exp(g[t]) S[t-1],   S[t] = R[t] + k (beta (v - R[t]^T k))^T,   y = K^-1/2 S^T q
    out = W_o [norm(y) silu(W_g x)]            norm(y) alone with use_gate=False

    x, out: [B, T, hidden_size]. num_heads heads of K = head_dim key channels; num_v_heads (None: as many) heads of
    V = head_dim * expand_v value channels, a multiple, which share the queries and keys. With allow_neg_eigval the
    eigenvalues of the transition go down to -1, and one layer tracks parity and swaps; without, they stay in [0, 1].

    conv_size taps per convolution, conv_bias its bias; use_short_conv=False leaves silu alone. output_gate_activation:
    "swish", its other name "silu", or "sigmoid". norm_eps is the norm's, which runs over the V channels of a head.
    A_log, dt_bias and o_norm.weight stay float32 when the layer is cast to a half type; g and beta are float32.
    Arguments and parameters have the names of fla's layer, so that its weights load. `mode` is accepted and changes
    nothing: the kernels choose. layer_idx is kept and not used.
    """

    use_gate: bool

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size, expand_v, head_dim, num_heads, num_v_heads, mode, use_short_conv, allow_neg_eigval,
            conv_size, conv_bias, layer_idx, norm_eps, 1, device, dtype, use_gate=use_gate,
        )  # fmt: skip
        if output_gate_activation not in GATES:
            names = ", ".join(GATES)
            raise ValueError(f"output_gate_activation must be one of {names}, got {output_gate_activation!r}")
        self.output_gate_activation = output_gate_activation
        self.a_proj = Linear(hidden_size, self.num_v_heads, bias=False, device=device, dtype=dtype)
        if use_gate:
            self.g_proj = Linear(hidden_size, self.value_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the decays; the projections and the convolutions keep torch's own initialisation."""
        self._draw(0, 16)

    def decay(self, x: Tensor) -> Tensor:
        """g [..., HV], the logarithm of the decay, float32."""
        return -torch.exp(self.A_log) * F.softplus(self.a_proj(x).to(self.A_log.dtype) + self.dt_bias)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.use_gate:
            return rms_norm_gated(y, self.o_norm.weight, eps=self.o_norm.eps)  # type: ignore[return-value]
        z = self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return sigmoid_gated(self.o_norm, y, z) if self.output_gate_activation == "sigmoid" else self.o_norm(y, z)


def sigmoid_gated(norm: GatedRMSNorm, y: Tensor, z: Tensor) -> Tensor:
    """norm(y) sigmoid(z), in y's type."""
    normed = rms_norm_gated(y, norm.weight, eps=norm.eps)
    return (normed * torch.sigmoid(z.to(norm.weight.dtype))).to(y.dtype)  # type: ignore[union-attr]
