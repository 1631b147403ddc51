"""Bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from .corpus import Stream


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    stream: Stream,
    *,
    window: int = 8192,
    bf16: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Sum of -log2 p over every token of every document, over the bytes of their text.

    The stream is read once from left to right in windows, whose size bounds the memory and nothing else: the state is
    carried from window to window inside a document and starts from zeros at each, so every token is predicted from all
    of its document before it. The end of a document is not predicted: it is no byte of the text.
    """
    device = next(model.parameters()).device
    starts = stream.offsets[:-1]
    end = len(stream.ids) - 1  # the last token predicts nothing
    nats = torch.zeros((), dtype=torch.float64)
    state: Any = None
    was_training = model.training
    model.eval()
    for begin in range(0, end, window):
        stop = min(begin + window, end)
        ids = stream.ids[begin : stop + 1].long()
        inside = starts[(starts > begin) & (starts < stop)] - begin
        boundaries = torch.cat([torch.tensor([0]), inside, torch.tensor([stop - begin])])
        continues = state is not None and not bool((starts == begin).any())
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(
                ids[:-1].view(1, -1).to(device),
                _begin(state, len(boundaries) - 1) if continues else None,
                cu_seqlens=boundaries.to(device),
            )
        nll = F.cross_entropy(out.logits[0].float(), ids[1:].to(device), reduction="none").double().cpu()
        is_text = ~torch.isin(torch.arange(begin + 1, stop + 1), starts)
        nats += nll[is_text].sum()
        state = tree_map(lambda tensor: tensor[-1:], out.state)
        if progress:
            progress(stop, end)
    model.train(was_training)
    return float(nats) / math.log(2) / stream.text_bytes


def _begin(state: Any, sequences: int) -> Any:
    """[1, ...] -> [sequences, ...]: the first goes on, the others start from zeros."""

    def extend(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(sequences - 1, *tensor.shape[1:])])

    return tree_map(extend, state)
