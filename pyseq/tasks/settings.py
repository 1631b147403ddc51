"""What a model is trained on a task with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import pyseq

from .problems import find


@dataclasses.dataclass(frozen=True)
class Settings:
    """`train` are the shortest and longest word to train on, `lengths` those to measure; `negative`: transitions may
    have negative eigenvalues, where the layer can have them."""

    task: str = "parity"
    layer: str = "gated_delta_net"
    negative: bool = True
    d_model: int = 64
    layers: int = 1
    heads: int = 2
    steps: int = 1000
    batch: int = 64
    train: tuple[int, int] = (3, 40)
    lengths: tuple[int, ...] = (40, 64, 128, 256)
    samples: int = 256   # words per measurement
    learning_rate: float = 3e-3
    final_rate: float = 0.01
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("d_model", "layers", "heads", "steps", "batch", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")
        if self.layer not in LAYERS:
            raise ValueError(f"layer = {self.layer!r}: expected one of {', '.join(LAYERS)}")
        if self.d_model % self.heads:
            raise ValueError(f"heads = {self.heads}: expected a divisor of d_model = {self.d_model}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype = {self.dtype!r}: expected float32 or float64")
        task = find(self.task)
        if not task.lengths(*self.train):
            raise ValueError(f"train = {self.train}: {task.name} has no words of such lengths")
        for length in self.lengths:
            if not task.lengths(length, length):
                raise ValueError(f"lengths: {task.name} has no words of length {length}")

    def make_layer(self) -> torch.nn.Module:
        return LAYERS[self.layer](self)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _delta(layer: Any, s: Settings) -> torch.nn.Module:
    """Without short convolutions: they remember too, and make a token's key depend on its neighbours, which makes a
    reflection per token hard to find."""
    return layer(
        s.d_model, expand_v=1, head_dim=s.d_model // s.heads, num_heads=s.heads, allow_neg_eigval=s.negative,
        use_short_conv=False,
    )  # fmt: skip


def _mamba2(s: Settings) -> torch.nn.Module:
    return pyseq.Mamba2(s.d_model, d_state=64, headdim=2 * s.d_model // s.heads)


def _rwkv7(s: Settings) -> torch.nn.Module:
    return pyseq.RWKV7(s.d_model, head_size=s.d_model // s.heads, iclr_scale=2 if s.negative else 1)


LAYERS = {
    "gated_delta_net": lambda s: _delta(pyseq.GatedDeltaNet, s),
    "kimi_delta_attention": lambda s: _delta(pyseq.KimiDeltaAttention, s),
    "mamba": lambda s: pyseq.Mamba(s.d_model),
    "mamba2": _mamba2,
    "rwkv7": _rwkv7,
}
