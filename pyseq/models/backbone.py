"""What stands between the embedding and the head: residual layers of one kind, and the norms around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pyseq._library import REGISTRY
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Embedding, Linear, in_kernels
from pyseq.models.config import Config
from pyseq.ops.rms_norm_gated import rms_norm_gated

ModelState = tuple[Any, ...]  # one state per layer


class RMSNorm(Exact):
    """r = x + residual; y = weight * r / sqrt(mean(r^2) + eps). Returns (y in x's type, r in float32).

    The sum, the norm and the product with the float32 weight are rounded once, at y: transformers rounds before the
    product too, the original code rounds r to the model's type in some paths.
    """

    exact = ("weight",)

    def __init__(self, size: int, eps: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=exact_dtype(dtype)))
        self.weight._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return rms_norm_gated(x, self.weight, eps=self.eps), x.to(self.weight.dtype)  # type: ignore[return-value]
        return rms_norm_gated(x, self.weight, residual=residual, eps=self.eps)  # type: ignore[return-value]

    def stepper(self) -> Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]:
        """forward for a loop in inference mode, without the op's checks."""
        if not in_kernels(self.weight):
            return self
        kernel, weight, eps = REGISTRY["rms_norm_gated"].active.forward, self.weight, self.eps
        size = weight.numel()

        def norm(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            y, total, _ = kernel(x, weight, None, residual, eps, size, False)
            return y, x.float() if residual is None else total

        return norm


class Block(torch.nn.Module):
    """x, residual -> mixer(norm(x + residual)), x + residual."""

    mixer: Any

    def __init__(self, config: Config, index: int, **kind: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, **kind)
        self.mixer = config.make_layer(index, **kind)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, state: Any, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        y, residual = self.norm(x, residual)
        y, state = self.mixer(y, state, cu_seqlens=cu_seqlens)
        return y, residual, state


class Backbone(torch.nn.Module):
    layers: Any  # ModuleList of Block

    def __init__(self, config: Config, **kind: Any) -> None:
        super().__init__()
        self.embeddings = Embedding(config.padded_vocab_size, config.d_model, **kind)
        self.layers = torch.nn.ModuleList(Block(config, i, **kind) for i in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps, **kind)

    def forward(
        self, x: torch.Tensor, state: ModelState | None, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, ModelState]:
        residual, states = None, []
        for block, before in zip(self.layers, [None] * len(self.layers) if state is None else state, strict=True):
            x, residual, after = block(x, residual, before, cu_seqlens)
            states.append(after)
        return self.norm_f(x, residual)[0], tuple(states)

    def step(self, x: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        """x [B, d_model], one token. With grad mode off, `state` is updated in place."""
        residual, states = None, []
        for block, before in zip(self.layers, state, strict=True):
            x, residual = block.norm(x, residual)
            x, after = block.mixer.step(x, before)
            states.append(after)
        return self.norm_f(x, residual)[0], tuple(states)

    def stepper(self, state: ModelState) -> Callable[[torch.Tensor], torch.Tensor]:
        norm_f = self.norm_f.stepper()
        layers = [(b.norm.stepper(), b.mixer.stepper(s)) for b, s in zip(self.layers, state, strict=True)]

        def step(x: torch.Tensor) -> torch.Tensor:
            residual = None
            for norm, mixer in layers:
                y, residual = norm(x, residual)
                x = mixer(y)
            return norm_f(x, residual)[0]

        return step

    def init_state(self, batch_size: int, device: Any, dtype: torch.dtype | None) -> ModelState:
        return tuple(block.mixer.init_state(batch_size, device, dtype) for block in self.layers)

    @torch.no_grad()
    def reset_parameters(self, head: Linear | None) -> None:
        """Embedding N(0, 0.02); biases of projections 0; W_out divided by sqrt(n_layer); a head keeps torch's own."""
        torch.nn.init.normal_(self.embeddings.weight, std=0.02)
        for name, p in self.layers.named_parameters():
            if name.endswith("out_proj.weight"):
                torch.nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                p.div_(math.sqrt(len(self.layers)))
            elif name.endswith(("in_proj.bias", "out_proj.bias")):
                p.zero_()
