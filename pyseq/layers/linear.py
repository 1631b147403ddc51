"""y = x W^T + b and rows of a table, with weights that can be packed for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pyseq._library import REGISTRY, runs_on_gpu
from pyseq.ops.linear import PackedLinear, linear, pack_linear

Tensor = torch.Tensor


class Packable(torch.nn.Module):
    """A module whose `weight` [out, in] may be held in the order in which `pyseq.linear` reads it, and only in that.

    Packed, it has no parameter and no gradient; `unpack` and `state_dict` give the same weight back, bit for bit.
    """

    weight: Any
    packed: PackedLinear | None = None
    flags: dict[str, Any]  # of the weight that was packed: what optimisers look for

    @property
    def kind(self) -> torch.dtype:
        """The type of the weight, packed or not."""
        return self.weight.dtype if self.packed is None else self.packed.dtype

    def pack(self) -> None:
        if self.packed is None and self.weight.dtype in (torch.float32, torch.bfloat16) and not self.weight.is_cuda:
            self.packed = pack_linear(self.weight)
            self.flags = dict(vars(self.weight))
            self.weight = None

    def unpack(self) -> None:
        if self.packed is not None:
            self.weight = torch.nn.Parameter(self.packed.unpack())
            vars(self.weight).update(self.flags)
            self.packed = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.packed.unpack()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        packed = self.packed is not None
        self.unpack()
        super()._apply(fn, recurse)
        if packed:
            self.pack()
        return self

    def stepper(self, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """`project` for a loop in inference mode, without the checks of the op."""
        weight = self.weight if self.packed is None else self.packed.panels
        if not in_kernels(weight):
            return lambda x: self.project(x, bias)
        kernel, n = REGISTRY["linear"].active.forward, (self.weight if self.packed is None else self.packed).shape[0]
        return lambda x: kernel(x, weight, bias, n)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, where `bias` is the caller's. Under autocast in its type, as torch's own linear."""
        if self.packed is not None:
            return linear(x, self.packed, bias)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # torch refuses to say for meta
            return F.linear(x, self.weight, bias)
        return linear(x, self.weight, bias)


class Linear(Packable, torch.nn.Linear):
    """`torch.nn.Linear` through `pyseq.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, self.bias)


class Embedding(Packable, torch.nn.Embedding):
    """`torch.nn.Embedding` whose table is also the weight of a head, through `project`."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is None:
            return F.embedding(ids, self.weight)
        panels = self.packed.panels  # [V / 32, d, 32] or, bfloat16, [V / 32, d / 2, 32, 2]
        rows = panels[ids // 32, :, ids % 32].flatten(ids.dim())
        return rows[..., : self.packed.in_features]


def in_kernels(weight: Tensor) -> bool:
    """Whether layers with such a weight run in this package's CPU kernels, so that a loop may call them directly."""
    return weight.device.type == "cpu" and weight.dtype != torch.float64 and not runs_on_gpu(weight)
