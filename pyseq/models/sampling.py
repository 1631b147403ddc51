"""Choosing the next token from logits."""

from __future__ import annotations

import torch


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of the tokens in `seen` by `penalty` (Keskar et al., 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (see `weigh`) of the tokens that may be drawn, and their ids (None: all, in order). logits [B, V].

    exp(logits / temperature) of the `top_k` largest; of these, in falling order, a token stays while the probability
    before it is less than `top_p`, so that at least one does.
    """
    vocab = logits.shape[-1]
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    top_p = 1.0 if top_p is None else top_p
    if top_k is not None and top_k < vocab:
        scaled, ids = scaled.topk(top_k)
        weights = weigh(scaled)
        return (within(weights, weights.sum(-1, keepdim=True), top_p)[0] if top_p < 1 else weights), ids
    if top_p >= 1:
        return weigh(scaled), None
    # Sorting a whole vocabulary costs more than a small model's step; the nucleus is mostly among the first few. On a
    # GPU to look whether it is costs more, and a captured graph cannot look.
    total = weigh(scaled).sum(-1, keepdim=True)
    n = min(vocab, 64) if scaled.device.type == "cpu" else vocab
    while True:
        values, ids = scaled.topk(n) if n < vocab else scaled.sort(descending=True)
        weights, complete = within(weigh(values), total, top_p)
        if n == vocab or bool(complete.all()):
            return weights, ids
        n = 8 * n if 16 * n < vocab else vocab


def weigh(scaled: torch.Tensor) -> torch.Tensor:
    """exp(scaled), for scaled <= 0, in whole multiples of 2^-40, as int64.

    Whole numbers, because their sums do not depend on the order: those of floats over a row differ from run to run on a
    GPU. The largest of a row, at 0, weighs 2^40; a vocabulary below 2^23 does not overflow.
    """
    return scaled.exp().mul_(2.0**40).long()


def within(weights: torch.Tensor, total: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Falling weights with those after the nucleus at 0, and [B], whether the last is after it."""
    after = weights.cumsum(-1) - weights >= (total.double() * top_p).ceil().long()
    return weights.masked_fill(after, 0), after[:, -1]


def draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One index per row, by inverting the cumulative weights at u [B, 1] in [0, 1), float32. Never one of weight 0."""
    cumulative = weights.cumsum(-1)
    at = (u.double() * cumulative[:, -1:]).long()  # below the total, as u is at most 1 - 2^-24
    return torch.searchsorted(cumulative, at, right=True)[:, 0]


def sample(
    logits: torch.Tensor,
    u: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """logits [B, V], u [B, 1] uniform in [0, 1) -> ids [B]. Temperature 0 takes the largest, the first of equals."""
    if temperature == 0:
        return logits.argmax(-1)
    weights, ids = candidates(logits, temperature, top_k, top_p)
    drawn = draw(weights, u)
    return drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
