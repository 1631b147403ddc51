"""A causal language model around any layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyseq._library import REGISTRY
from pyseq.layers.exact import Exact, exact_dtype
from pyseq.layers.linear import Embedding, Linear, Packable, in_kernels
from pyseq.models import generation
from pyseq.models.checks import check_ids, check_mask
from pyseq.models.config import Config
from pyseq.models.text import ByteTokenizer, Tokenizer
from pyseq.ops.rms_norm_gated import rms_norm_gated

ModelState = tuple[Any, ...]  # one state per layer


class Output(NamedTuple):
    logits: torch.Tensor  # [B, T, padded vocab], float32 (float64 in a float64 model)
    state: ModelState


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


class CausalLM(torch.nn.Module):
    """logits = head(norm(x + layers(...))), a residual stream in float32 around `config.n_layer` layers.

    Parameter names are those of the Mamba checkpoints: backbone.embeddings, backbone.layers.<i>.norm, .mixer,
    backbone.norm_f, and lm_head where the head is not tied to the embedding. `tokenizer` may hold one.
    """

    def __init__(self, config: Config, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = ByteTokenizer() if config.vocab_size == ByteTokenizer.vocab_size else None
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head: Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embedding N(0, 0.02); biases of projections 0; W_out divided by sqrt(n_layer)."""
        torch.nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        for name, p in self.backbone.layers.named_parameters():
            if name.endswith("out_proj.weight"):
                torch.nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                p.div_(math.sqrt(self.config.n_layer))
            elif name.endswith(("in_proj.bias", "out_proj.bias")):
                p.zero_()

    def forward(
        self,
        input_ids: torch.Tensor,
        state: ModelState | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Output:
        """input_ids [B, T] -> logits [B, T, padded vocab] and the state after the last token; `state` is not changed.

        attention_mask: [B, T], 0 on the left where a row is padded. Padding is taken out before the first layer, so a
        padded row gives what it gives alone; its logits at padding are those of a zero vector.
        cu_seqlens: [S+1], packs S sequences into a batch of 1; the states then have S rows.
        logits_to_keep: compute the logits of the last so many positions only.
        """
        self._check(input_ids, attention_mask, cu_seqlens, logits_to_keep)
        if state is not None and len(state) != self.config.n_layer:
            raise ValueError(f"state must hold one state per layer, {self.config.n_layer}, got {len(state)}")
        if attention_mask is None:
            x, after = self.backbone(self.backbone.embeddings(input_ids), state, cu_seqlens)
        else:
            keep = attention_mask.bool()
            lengths = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1)])
            packed = self.backbone.embeddings(input_ids[keep])[None]
            packed, after = self.backbone(packed, state, lengths.cumsum(0))
            x = packed.new_zeros(*input_ids.shape, self.config.d_model)
            x[keep] = packed[0]
        if logits_to_keep is not None:
            x = x[:, max(x.shape[1] - logits_to_keep, 0) :]
        return Output(self.head(x), after)

    def step(self, input_ids: torch.Tensor, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        """input_ids [B] -> (logits [B, padded vocab], state). With grad mode off, `state` is updated in place."""
        x, residual, states = self.backbone.embeddings(input_ids), None, []
        for block, before in zip(self.backbone.layers, state, strict=True):
            x, residual = block.norm(x, residual)
            x, after = block.mixer.step(x, before)
            states.append(after)
        return self.head(self.backbone.norm_f(x, residual)[0]), tuple(states)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.backbone.embeddings.project(x) if self.lm_head is None else self.lm_head(x)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def stepper(self, state: ModelState) -> Callable[[torch.Tensor], torch.Tensor]:
        """ids [B] -> logits [B, padded vocab] for a loop in inference mode, which updates `state` in place.

        The same as `step`, with all that is the same for every token done here.
        """
        backbone = self.backbone
        embed, norm_f = backbone.embeddings, backbone.norm_f.stepper()
        head = (backbone.embeddings if self.lm_head is None else self.lm_head).stepper()
        layers = [(b.norm.stepper(), b.mixer.stepper(s)) for b, s in zip(backbone.layers, state, strict=True)]

        def step(ids: torch.Tensor) -> torch.Tensor:
            x, residual = embed(ids), None
            for norm, mixer in layers:
                y, residual = norm(x, residual)
                x = mixer(y)
            logits = head(norm_f(x, residual)[0])
            return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

        return step

    def pack(self) -> CausalLM:
        """Packs the weights of projections and head for inference: steps at memory bandwidth, nothing is held twice.

        Packed weights are no parameters and get no gradient. `train()` and `unpack` undo it; saving works as before.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, Packable) and (module is not self.backbone.embeddings or self.lm_head is None):
                module.pack()
        return self

    def unpack(self) -> CausalLM:
        for module in self.modules():
            if isinstance(module, Packable):
                module.unpack()
        return self

    def train(self, mode: bool = True) -> CausalLM:
        if mode:
            self.unpack()
        return super().train(mode)

    def init_state(self, batch_size: int, device: Any = None, dtype: torch.dtype | None = None) -> ModelState:
        return tuple(block.mixer.init_state(batch_size, device, dtype) for block in self.backbone.layers)

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **options: Any) -> Any:
        return generation.generate(self, input_ids, max_new_tokens, **options)

    generate.__doc__ = generation.generate.__doc__

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes model.safetensors and config.json (and tokenizer.json) into the folder `path`, atomically.

        transformers reads what a Mamba, FalconMamba or Mamba-2 model writes, if it has such a layer.
        """
        from pyseq.models.pretrained import save_pretrained

        save_pretrained(self, path)

    def _check(self, ids: Any, mask: Any, cu_seqlens: Any, keep: Any) -> None:
        check_ids(ids, self.config.padded_vocab_size)
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("attention_mask and cu_seqlens: give one of the two")
            check_mask(mask, ids)
        if keep is not None and (
            isinstance(keep, bool) or not isinstance(keep, int) or keep < 1 or cu_seqlens is not None
        ):
            raise ValueError(f"logits_to_keep must be a positive integer, without cu_seqlens, got {keep!r}")
