"""Tasks: random words and what a model has to say about them, made on the fly from a seed.

A word begins with a token of its own, `begin`, from which a model may set its state up. Where nothing is asked, the
target is IGNORED, which cross_entropy leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import Group, group

IGNORED = -100


class Task:
    """`tokens` different tokens, the last of them `begin`; `classes` different answers."""

    name: str
    tokens: int
    classes: int
    shortest = 1   # of its words
    stride = 1     # lengths are shortest, shortest + stride, ...

    @property
    def begin(self) -> int:
        return self.tokens - 1

    def lengths(self, low: int, high: int) -> list[int]:
        """The lengths of words from `low` to `high` that there are."""
        return [n for n in range(low, high + 1) if n >= self.shortest and (n - self.shortest) % self.stride == 0]

    def sample(self, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets [batch, 1 + length] of random words: the same for the same arguments."""
        if not self.lengths(length, length):
            raise ValueError(
                f"{self.name}: a word of length {length}, expected {self.shortest} + a multiple of {self.stride}"
            )
        words, answers = self.words(batch, length, torch.Generator().manual_seed(seed))
        first = words.new_full((batch, 1), self.begin)
        return torch.cat([first, words], 1), torch.cat([torch.full_like(first, IGNORED), answers], 1)

    def words(self, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Words and answers, [batch, length]."""
        raise NotImplementedError


class GroupWords(Task):
    """Tokens are elements of a group, or with `swaps` those that exchange two points; after each, the product of all so
    far. Source: Merrill, Petty and Sabharwal, 2024."""

    def __init__(self, elements: Group, swaps: bool = False) -> None:
        self.group = elements
        self.alphabet = elements.swaps() if swaps else torch.arange(elements.order)
        self.name = f"{elements.name}{'-swaps' if swaps else ''}".lower()
        self.tokens, self.classes = len(self.alphabet) + 1, elements.order

    def words(self, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        words = torch.randint(len(self.alphabet), (batch, length), generator=random)
        return words, self.group.products(self.alphabet[words])


class Parity(Task):
    """Tokens 0 and 1; after the last, whether the number of ones is odd."""

    name, tokens, classes = "parity", 3, 2

    def words(self, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        words = torch.randint(2, (batch, length), generator=random)
        return words, _last(words, words.sum(1) % 2)


class EvenPairs(Task):
    """Tokens 0 and 1; after the last, whether it equals the first."""

    name, tokens, classes = "even-pairs", 3, 2

    def words(self, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        words = torch.randint(2, (batch, length), generator=random)
        return words, _last(words, (words[:, 0] == words[:, -1]).long())


class ModularArithmetic(Task):
    """Numbers modulo m and between them +, - or *; after the last token, =, the value. * binds more tightly.

    Token i < m is the number i, m .. m + 3 are + - * =.
    """

    name, shortest, stride = "mod-arithmetic", 2, 2

    def __init__(self, modulus: int = 5) -> None:
        self.modulus, self.tokens, self.classes = modulus, modulus + 5, modulus

    def words(self, batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        m, count = self.modulus, length // 2
        numbers = torch.randint(m, (batch, count), generator=random)
        signs = torch.randint(3, (batch, count), generator=random)
        signs[:, -1] = 3
        words = torch.stack([numbers, m + signs], 2).flatten(1)
        total, product = torch.zeros(batch, dtype=torch.int64), numbers[:, 0]
        for i in range(1, count):
            sign, number = signs[:, i - 1], numbers[:, i]
            total = torch.where(sign == 2, total, (total + product) % m)
            product = torch.where(sign == 2, product * number % m, torch.where(sign == 1, -number, number))
        return words, _last(words, (total + product) % m)


def find(name: str) -> Task:
    """A task by name: parity, even-pairs, mod-arithmetic, a group (s5, a5, z60, a4xz5), or s5-swaps."""
    plain: dict[str, type[Task]] = {"parity": Parity, "even-pairs": EvenPairs, "mod-arithmetic": ModularArithmetic}
    if name.lower() in plain:
        return plain[name.lower()]()
    stem = name.lower().removesuffix("-swaps")
    try:
        return GroupWords(group(stem), swaps=stem != name.lower())
    except ValueError as error:
        raise ValueError(f"task: {name!r}: expected {', '.join(plain)} or a group; {error}") from None


def _last(words: Tensor, answer: Tensor) -> Tensor:
    """Answers that are asked for after the last token alone."""
    answers = torch.full_like(words, IGNORED)
    answers[:, -1] = answer
    return answers
