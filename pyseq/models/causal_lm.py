"""A causal language model around any layer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from pyseq.layers.linear import Linear, Packable
from pyseq.models import generation
from pyseq.models.backbone import Backbone, ModelState
from pyseq.models.checks import check_ids, check_mask
from pyseq.models.config import Config
from pyseq.models.rwkv7 import RWKV7Backbone
from pyseq.models.text import ByteTokenizer, Tokenizer


class Output(NamedTuple):
    logits: torch.Tensor  # [B, T, padded vocab], float32 (float64 in a float64 model)
    state: ModelState


class CausalLM(torch.nn.Module):
    """logits = head(norm(x + layers(...))), a residual stream in float32 around `config.n_layer` layers.

    Parameter names are those of the Mamba checkpoints: backbone.embeddings, backbone.layers.<i>.norm, .mixer,
    backbone.norm_f, and lm_head where the head is not tied to the embedding. Of RWKV-7, whose layers have their norms
    within: backbone.norm_0, behind the embedding, and backbone.layers.<i>.ln1, .att, .ln2, .ffn. `tokenizer` may hold
    one.
    """

    backbone: Any  # Backbone or RWKV7Backbone

    def __init__(self, config: Config, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = ByteTokenizer() if config.vocab_size == ByteTokenizer.vocab_size else None
        make = RWKV7Backbone if config.layer == "RWKV7" else Backbone
        self.backbone = make(config, device=device, dtype=dtype)
        self.lm_head: Linear | None = None
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.backbone.reset_parameters(self.lm_head)

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
        x, after = self.backbone.step(self.backbone.embeddings(input_ids), state)
        return self.head(x), after

    def head(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.backbone.embeddings.project(x) if self.lm_head is None else self.lm_head(x)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def stepper(self, state: ModelState) -> Callable[[torch.Tensor], torch.Tensor]:
        """ids [B] -> logits [B, padded vocab] for a loop in inference mode, which updates `state` in place.

        The same as `step`, with all that is the same for every token done here.
        """
        embed, body = self.backbone.embeddings, self.backbone.stepper(state)
        head = (embed if self.lm_head is None else self.lm_head).stepper()

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits = head(body(embed(ids)))
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
        return self.backbone.init_state(batch_size, device, dtype)

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
