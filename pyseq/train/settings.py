"""What a run is told: everything its result depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pyseq import _C
from pyseq.models.config import LAYERS

HEADS = {"Mamba2": "headdim", "RWKV7": "head_size"}  # what the layers with heads call the size of one


@dataclass(frozen=True)
class Settings:
    """Settings of a run. Lengths are in tokens; a token is a byte unless a tokenizer is given.

    A step reads `accumulate * batch * length` tokens. Exactly one of `steps` and `time_limit` is given; a time limit
    (seconds) is turned into a number of steps before the first one, by timing a few steps on a copy of the model, so
    that the learning rate is a function of the step alone and a resumed run repeats it to the bit.
    """

    data: tuple[str, ...] = ()  # files and folders; empty: the standard library of this Python
    tokenizer: str | None = None  # a tokenizer.json or RWKV's vocabulary; None: bytes
    held_out: int | None = None  # bytes; None: a twentieth of the text, at most 256 KiB
    start_from: str | None = None  # a checkpoint whose weights and geometry to start from; None: fresh weights
    layer: str | None = None  # "Mamba", "Mamba2", "RWKV7"; None: that of the checkpoint to start from, else Mamba
    d_model: int = 256
    layers: int = 4
    d_state: int | None = None  # None: the layer's own, 16 for Mamba and 128 for Mamba2
    headdim: int | None = None  # of Mamba2 and RWKV7; None: their own, 64
    batch: int = 8
    length: int = 512
    accumulate: int = 1
    carry_state: bool = False
    steps: int | None = None
    time_limit: float | None = None
    learning_rate: float = 3e-3
    final_rate: float = 0.1  # of learning_rate, reached by the last step
    warmup: int = 20  # steps, at most half of all
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bf16: bool = False
    device: str = "cpu"
    seed: int = 0
    evaluate_every: int = 0  # steps; 0: five times in the run
    save_every: int = 0  # steps; 0: five times in the run

    def __post_init__(self) -> None:
        at_least_one = ("d_model", "layers", "batch", "length", "accumulate")
        at_least_zero = ("warmup", "weight_decay", "evaluate_every", "save_every", "seed")
        above_zero = ("learning_rate", "clip")
        for name in at_least_one:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in at_least_zero:
            _require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in above_zero:
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value > 0, "a finite number above 0")
        _require("final_rate", self.final_rate, 0 <= self.final_rate <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        if self.layer is not None and self.layer not in LAYERS:
            raise ValueError(f"layer = {self.layer!r}: expected one of {', '.join(LAYERS)}")
        for name in ("d_state", "headdim"):
            _require(name, value := getattr(self, name), value is None or value >= 1, "at least 1")
        known = self.layer or not self.start_from  # else the checkpoint says which layer it is
        if self.headdim is not None and self.layer not in HEADS and known:
            raise ValueError(f"headdim = {self.headdim}: {self.layer or 'Mamba'} has no heads; Mamba2 and RWKV7 have")
        if self.d_state is not None and self.layer == "RWKV7":
            raise ValueError(f"d_state = {self.d_state}: the state of RWKV7 has the size of its heads, headdim")
        if self.held_out is not None:
            _require("held_out", self.held_out, self.held_out >= 1, "at least 1 byte")
        if (self.steps is None) == (self.time_limit is None):
            raise ValueError(f"steps = {self.steps} and time_limit = {self.time_limit}: exactly one must be given")
        if self.steps is not None:
            _require("steps", self.steps, self.steps >= 1, "at least 1")
        if self.time_limit is not None:
            _require("time_limit", self.time_limit, 0 < self.time_limit < math.inf, "seconds, above 0")

    @property
    def layer_args(self) -> dict[str, int]:
        given = {"d_state": self.d_state, HEADS.get(self.layer or "", "headdim"): self.headdim}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def tokens_per_step(self) -> int:
        return self.accumulate * self.batch * self.length

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        known = {field.name for field in dataclasses.fields(cls)}
        values = {**_ADDED, **values}
        if set(values) != known:
            raise ValueError(f"settings: unknown {sorted(set(values) - known)}, missing {sorted(known - set(values))}")
        return cls(**{**values, "data": tuple(values["data"])})


# Settings that runs of before they were added do not hold, and what those runs meant.
_ADDED = {"layer": None, "headdim": None}


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} = {value}: expected {expected}")


# Sized for two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"time_limit": 120.0, "d_model": 192, "layers": 3, "batch": 4, "length": 256, "learning_rate": 6e-3},
    "small": {"time_limit": 1800.0, "d_model": 256, "layers": 6, "batch": 16, "length": 512, "learning_rate": 3e-3},
    "medium": {"time_limit": 21600.0, "d_model": 512, "layers": 8, "batch": 16, "length": 1024, "learning_rate": 2e-3},
}


def preset(name: str, device: str = "cpu") -> dict[str, Any]:
    """The values of a preset on a device: bfloat16 products on a GPU, and where the CPU has instructions for them."""
    return {**PRESETS[name], "bf16": device != "cpu" or bool(_C.cpu_has_avx512_bf16), "device": device}
