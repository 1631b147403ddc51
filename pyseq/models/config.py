"""What a causal language model is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from pyseq.layers.mamba import Mamba
from pyseq.layers.mamba2 import Mamba2
from pyseq.layers.rwkv7 import RWKV7

LAYERS: dict[str, type[torch.nn.Module]] = {"Mamba": Mamba, "Mamba2": Mamba2, "RWKV7": RWKV7}

LIMITS = {"d_model": 1 << 20, "n_layer": 1 << 14, "vocab_size": 1 << 24, "pad_vocab_size_multiple": 1 << 20}


@dataclasses.dataclass(frozen=True)
class Config:
    """`layer` names a class of `pyseq`, `layer_args` are its keyword arguments besides d_model.

    The embedding has `vocab_size` rows rounded up to a multiple of `pad_vocab_size_multiple`; ids from `vocab_size`
    on are never sampled. `eos_token_id` is one id, several, or None.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    layer: str = "Mamba"
    layer_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    pad_vocab_size_multiple: int = 8
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"config: {name} must be an integer from 1 to {limit}, got {value!r}")
        if not isinstance(self.layer, str) or self.layer not in LAYERS:
            raise ValueError(f"config: layer must be one of {', '.join(LAYERS)}, got {self.layer!r}")
        if not isinstance(self.layer_args, dict) or not all(isinstance(key, str) for key in self.layer_args):
            raise ValueError(f"config: layer_args must be keyword arguments, got {self.layer_args!r}")
        if type(self.tie_embeddings) is not bool:
            raise ValueError(f"config: tie_embeddings must be true or false, got {self.tie_embeddings!r}")
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ValueError(f"config: norm_eps must be a positive number, got {eps!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if name == "eos_token_id" and isinstance(value, list) else [value]:
                if token is not None and (type(token) is not int or token < 0):
                    raise ValueError(f"config: {name} must be a token id, got {value!r}")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def make_layer(self, index: int, **kind: Any) -> torch.nn.Module:
        try:
            return LAYERS[self.layer](self.d_model, **{"layer_idx": index, **self.layer_args, **kind})
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"config: layer_args do not fit {self.layer}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}; this version knows {', '.join(sorted(known))}")
        missing = sorted({"d_model", "n_layer", "vocab_size"} - set(values))
        if missing:
            raise ValueError(f"config: {missing[0]!r} is missing")
        return cls(**values)
