"""Parameters that a cast to a half type leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


class Exact(torch.nn.Module):
    """A module whose parameters named in `exact` need more digits than a half type has.

    Cast to one, they follow the module to another device as float32: kept as they were, or narrowed from float64.
    """

    exact: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: self.get_parameter(name).data for name in self.exact}
        super()._apply(fn, recurse)
        for name, data in before.items():
            p = self.get_parameter(name)
            if p.dtype in HALF:
                p.data = data.to(p.device, torch.float32)
                if p.grad is not None:
                    p.grad = p.grad.float()
        return self


def exact_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The type of such parameters in a module made as `dtype`; None is torch's default type."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
