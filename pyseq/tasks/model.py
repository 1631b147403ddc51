"""The model that a task trains: an answer after every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyseq.layers.rwkv7 import RWKV7
from pyseq.models.backbone import RMSNorm

from .problems import Task
from .settings import Settings


class Block(nn.Module):
    """x + mixer(norm(x)), and of that u: u + W_2 gelu(W_1 norm(u))."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x, None)[0])[0]
        return x + self.mlp(self.norm2(x, None)[0])


class Whole(nn.Module):
    """A layer with residuals and norms of its own: an RWKV-7."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Tagger(nn.Module):
    """tokens [B, T] -> logits [B, T, classes]."""

    def __init__(self, task: Task, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.tokens, settings.d_model)
        layers = [settings.make_layer() for _ in range(settings.layers)]
        blocks = [Whole(u) if isinstance(u, RWKV7) else Block(u, settings.d_model) for u in layers]
        self.blocks = nn.Sequential(*blocks)
        self.norm = RMSNorm(settings.d_model, 1e-5)
        self.head = nn.Linear(settings.d_model, task.classes)
        self.to(torch.device(settings.device), getattr(torch, settings.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens)), None)[0])
