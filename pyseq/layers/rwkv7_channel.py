"""The channel mix of RWKV-7: two projections around a squared ReLU, of a token mixed with the one before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Linear
from pyseq.layers.rwkv7_start import Place
from pyseq.layers.token_shift import token_shift

Tensor = torch.Tensor


class RWKV7ChannelMix(Exact):
    """out = W_v relu(W_k (x + (x_before - x) mix))^2.

    x [B, T, D]; d_ffn channels between. `mix` stays float32 when the layer is cast to a half type.
    """

    exact = ("mix",)

    def __init__(
        self, d_model: int, d_ffn: int, *, place: Place, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.place = place
        self.key = Linear(d_model, d_ffn, bias=False, device=device, dtype=dtype)
        self.value = Linear(d_ffn, d_model, bias=False, device=device, dtype=dtype)
        self.mix = torch.nn.Parameter(torch.empty(d_model, device=device, dtype=exact_dtype(dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_v is zero, so that a layer begins as the identity."""
        self.mix.copy_(self.place.mix_channels())
        bound = 0.5 / self.key.in_features**0.5
        self.key.weight.uniform_(-bound, bound)
        self.value.weight.zero_()

    def forward(self, x: Tensor, shift: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], what came before it [B, D] -> (out, the last x)."""
        x = x.to(self.mix.dtype)
        before, shift = token_shift(x, shift, cu_seqlens)
        return self.mixed(x, before), shift

    def step(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [B, D], one token -> out; `shift` is updated in place."""
        y = self.mixed(x.to(self.mix.dtype), shift)
        shift.copy_(x)
        return y

    def stepper(self, shift: Tensor) -> Callable[[Tensor], Tensor]:
        """`step` for a loop in inference mode, x being float32 or float64."""
        key, value, mix, kind = self.key.stepper(), self.value.stepper(), self.mix, self.key.kind

        def step(x: Tensor) -> Tensor:
            mixed = torch.addcmul(x, shift - x, mix).to(kind)
            shift.copy_(x)
            return value(torch.relu(key(mixed)).square())

        return step

    def mixed(self, x: Tensor, before: Tensor) -> Tensor:
        mixed = torch.addcmul(x, before - x, self.mix).to(self.key.kind)
        return self.value(torch.relu(self.key(mixed)).square())
