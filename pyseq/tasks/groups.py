"""Finite groups whose elements are numbers and whose products are computed, not looked up."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = {"S": 8, "A": 8, "Z": 1 << 20}


class Cyclic:
    """Z_n: 0 .. n - 1 under addition modulo n."""

    def __init__(self, n: int) -> None:
        self.order = n

    def products(self, ids: Tensor) -> Tensor:
        return ids.cumsum(1) % self.order


class Permutations:
    """S_n, or A_n with `even`: permutations of n points, (p q)(i) = p(q(i)), numbered in lexicographic order."""

    def __init__(self, n: int, even: bool) -> None:
        self.n, self.even = n, even
        listed = torch.tensor(list(itertools.permutations(range(n))))
        self.elements = listed[_inversions(listed).sum(1) % 2 == 0] if even else listed
        self.order = len(self.elements)

    def rank(self, p: Tensor) -> Tensor:
        """The numbers of permutations [..., n]: their places in the factorial number system.

        Of the permutations 2 r and 2 r + 1, which differ in their last two images, exactly one is even.
        """
        places = torch.tensor([math.factorial(self.n - 1 - i) for i in range(self.n)])
        rank = (_inversions(p) * places).sum(-1)
        return rank // 2 if self.even else rank

    def products(self, ids: Tensor) -> Tensor:
        factors = self.elements[ids]  # [B, T, n]
        p, ranks = torch.arange(self.n).expand(len(ids), self.n), []
        for t in range(ids.shape[1]):
            p = p.gather(1, factors[:, t])
            ranks.append(self.rank(p))
        return torch.stack(ranks, 1) if ranks else ids.clone()


class Group:
    """A direct product of cyclic groups, S_n and A_n. Elements are 0 .. order - 1, and 0 is the identity."""

    def __init__(self, name: str, factors: Sequence[Cyclic | Permutations]) -> None:
        self.name, self.factors = name, factors
        self.order = math.prod(factor.order for factor in factors)

    def products(self, ids: Tensor) -> Tensor:
        """x_1, x_1 x_2, x_1 x_2 x_3, ... of words [B, T]."""
        result = torch.zeros_like(ids)
        weight = self.order
        for factor in self.factors:
            weight //= factor.order
            result += weight * factor.products(ids // weight % factor.order)
        return result

    def swaps(self) -> Tensor:
        """The elements that exchange two points: of S_n alone, which they generate."""
        only = self.factors[0]
        if len(self.factors) > 1 or not isinstance(only, Permutations) or only.even:
            raise ValueError(f"group: {self.name} has no swaps; S2, S3, ... have")
        return ((only.elements != torch.arange(only.n)).sum(1) == 2).nonzero()[:, 0]


def group(name: str) -> Group:
    """The group of a name: S5, A5, Z60, or a direct product such as A4xZ5."""
    factors: list[Cyclic | Permutations] = []
    for part in name.upper().split("X"):
        found = re.fullmatch(r"([SAZ])([1-9]\d*)", part)
        if not found:
            raise ValueError(f"group: {name!r}: expected S5, A5, Z60 or a product of such, A4xZ5")
        letter, n = found[1], int(found[2])
        if n > LARGEST[letter]:
            raise ValueError(f"group: {name!r}: {letter}{n} is too large, expected at most {letter}{LARGEST[letter]}")
        factors.append(Cyclic(n) if letter == "Z" else Permutations(n, letter == "A"))
    return Group(name.upper().replace("X", "x"), factors)


def _inversions(p: Tensor) -> Tensor:
    """Per point the number of later points with a smaller image, [..., n]."""
    return (p[..., :, None] > p[..., None, :]).triu(1).sum(-1)
