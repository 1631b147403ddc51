"""The values that an RWKV-7 layer begins with, by its place in the model: those of the authors' trainer."""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor


def rank(factor: float, width: int) -> int:
    """Of a low-rank product: factor * sqrt(width), in whole 32s."""
    return max(32, round(factor * math.sqrt(width) / 32) * 32)


class Place:
    """Layer l of L, r1 = 1 - l / L and r0 = l / (L - 1), and the ramps over D channels in heads of N.

    A model of one layer has r0 = 0, where the formula says 0 / 0.
    """

    def __init__(self, index: int, depth: int, width: int, head: int) -> None:
        self.r0, self.r1 = index / max(depth - 1, 1), 1 - index / depth
        i = torch.arange(width, dtype=torch.float64, device="cpu")
        self.share = i / width
        self.ramp = i / max(width - 1, 1)
        self.linear = self.ramp - 0.5
        half = max((head - 1) / 2, 0.5)
        s = (i % head - (head - 1) / 2) / half
        self.zigzag = s * s.abs()
        self.depth, self.index = depth, index

    def mix(self) -> Tensor:
        """[6, D] of the time mix, for r, w, k, v, a, g."""
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        return torch.stack([1 - self.share ** (power * self.r1) for power in powers.values()])

    def mix_channels(self) -> Tensor:
        return 1 - self.share ** (self.r1**4)

    def vectors(self) -> dict[str, Tensor]:
        """w0, a0, v0, k_k [D] of the time mix."""
        return {
            "w0": -5.5 + 6 * self.ramp ** (1 + self.r0**0.3) + 2.5 * self.zigzag,
            "a0": -0.19 + 0.3 * self.zigzag + 0.4 * self.linear,
            "v0": 0.73 - 0.4 * self.linear,
            "k_k": 0.71 - 0.1 * self.linear,
        }

    def norm(self) -> float:
        """The weight of the norm over heads."""
        return ((1 + self.index) / self.depth) ** 0.7


@torch.no_grad()
def orthogonal(weight: Tensor, gain: float) -> None:
    """Fills [rows, columns] with orthogonal rows or columns, whichever are fewer, of length `gain`.

    Drawn in float32: into a half type torch cannot.
    """
    if weight.is_meta:
        return
    drawn = torch.empty(weight.shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    weight.copy_(torch.nn.init.orthogonal_(drawn, gain))


def stretch(rows: int, columns: int) -> float:
    """By which the gain of a matrix grows that has more rows than columns."""
    return math.sqrt(max(rows / columns, 1))
