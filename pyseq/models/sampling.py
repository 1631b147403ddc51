"""Choosing the next token from logits."""

from __future__ import annotations

import torch


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive and multiplies negative logits of the tokens in `seen` by `penalty` (Keskar et al., 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the tokens that may be drawn, and their ids (None: all, in order). logits [B, V].

    softmax(logits / temperature) over the `top_k` largest; of these, in falling order, a token stays while the
    probability before it is less than `top_p`, so that at least one does.
    """
    vocab = logits.shape[-1]
    k = vocab if top_k is None else min(top_k, vocab)
    scaled = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_p is None or top_p >= 1:
        if k == vocab:
            return scaled.softmax(-1), None
        scaled, ids = scaled.topk(k)
        return scaled.softmax(-1), ids
    # Sorting a whole vocabulary costs more than a small model's step; the nucleus is mostly among the first few. On a
    # GPU to look whether it is costs more, and a captured graph cannot look.
    total = (scaled if k == vocab else scaled.topk(k)[0]).exp().sum(-1, keepdim=True)
    n = min(k, 64) if scaled.device.type == "cpu" else k
    while True:
        values, ids = scaled.topk(n)
        probs = values.exp() / total
        before = probs.cumsum(-1) - probs
        if n == k or bool((before[:, -1] >= top_p).all()):
            probs = probs.masked_fill(before >= top_p, 0.0)
            return probs / probs.sum(-1, keepdim=True), ids
        n = min(k, 8 * n)


def draw(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One index per row, by inverting the cumulative distribution at u [B, 1] in [0, 1). Never one of probability 0."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    u = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, u, right=True)[:, 0]


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
    probs, ids = candidates(logits, temperature, top_k, top_p)
    drawn = draw(probs, u)
    return drawn if ids is None else ids.gather(-1, drawn[:, None])[:, 0]
