"""The layers of an RWKV-7 language model: norms of their own, and the first one's values handed to all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyseq.layers.linear import Embedding, Linear
from pyseq.layers.norm import LayerNorm
from pyseq.layers.rwkv7_start import orthogonal, stretch
from pyseq.models.backbone import ModelState
from pyseq.models.config import Config


class RWKV7Backbone(torch.nn.Module):
    """x = norm_0(embedding); x, v_first = layer(x, v_first) for each layer; norm_f(x). x is float32 throughout."""

    layers: Any  # ModuleList of RWKV7

    def __init__(self, config: Config, **kind: Any) -> None:
        super().__init__()
        self.embeddings = Embedding(config.padded_vocab_size, config.d_model, **kind)
        self.norm_0 = LayerNorm(config.d_model, config.norm_eps, **kind)
        place = {"n_layer": config.n_layer, "norm_eps": config.norm_eps}
        self.layers = torch.nn.ModuleList(config.make_layer(i, **place, **kind) for i in range(config.n_layer))
        self.norm_f = LayerNorm(config.d_model, config.norm_eps, **kind)

    def forward(
        self, x: torch.Tensor, state: ModelState | None, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, ModelState]:
        x, v_first, states = self.norm_0(x), None, []
        for layer, before in zip(self.layers, [None] * len(self.layers) if state is None else state, strict=True):
            x, after, v_first = layer(x, before, cu_seqlens=cu_seqlens, v_first=v_first, return_v_first=True)
            states.append(after)
        return self.norm_f(x).to(self.embeddings.kind), tuple(states)

    def step(self, x: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        """x [B, d_model], one token. With grad mode off, `state` is updated in place."""
        x, v_first, states = self.norm_0(x), None, []
        for layer, before in zip(self.layers, state, strict=True):
            x, after, v_first = layer.step(x, before, v_first=v_first, return_v_first=True)
            states.append(after)
        return self.norm_f(x).to(self.embeddings.kind), tuple(states)

    def stepper(self, state: ModelState) -> Callable[[torch.Tensor], torch.Tensor]:
        kind = self.embeddings.kind
        layers = [layer.stepper(s) for layer, s in zip(self.layers, state, strict=True)]

        def step(x: torch.Tensor) -> torch.Tensor:
            x, v_first = self.norm_0(x), None
            for layer in layers:
                x, v_first = layer(x, v_first)
            return self.norm_f(x).to(kind)

        return step

    def init_state(self, batch_size: int, device: Any, dtype: torch.dtype | None) -> ModelState:
        return tuple(layer.init_state(batch_size, device, dtype) for layer in self.layers)

    @torch.no_grad()
    def reset_parameters(self, head: Linear | None) -> None:
        """As the authors' trainer: a tiny embedding, orthogonal matrices, zero where a layer adds to x.

        An embedding that is the head too is drawn as a head.
        """
        torch.nn.init.uniform_(self.embeddings.weight, -1e-4, 1e-4)
        for layer in self.layers:
            orthogonal(layer.att.receptance.weight, 1.0)
            orthogonal(layer.att.key.weight, 0.1)
            orthogonal(layer.att.value.weight, 1.0)
            orthogonal(layer.ffn.key.weight, 1.0)
        last = (self.embeddings if head is None else head).weight
        orthogonal(last, 0.5 * stretch(*last.shape))
