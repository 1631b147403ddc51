"""Which tokens a step reads: a pure function of the seed and the number of batches read before.

An epoch reads the documents in a shuffled order, one after another. That stream is cut into `batch` rows of equal
length, and each row into windows of `length` tokens, read from left to right if the state is carried from window to
window and in a shuffled order if not. A batch packs its rows into one sequence, [1, batch * length], with a boundary
(`cu_seqlens`) where a row or a document begins: no state ever crosses from one document into the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .corpus import Stream


@dataclass(frozen=True)
class Batch:
    inputs: Tensor  # [1, batch * length]
    targets: Tensor  # [1, batch * length]
    cu_seqlens: Tensor  # [S + 1]
    first: Tensor  # [batch]: the sequence that begins each row
    last: Tensor  # [batch]: the sequence that ends it
    continues: Tensor  # [batch], bool: the row goes on in the document in which its previous window ended


def move(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; to a GPU from pinned memory, so that nobody waits for the copy."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


class Batches:
    """`batches[k]` is the k-th batch."""

    def __init__(self, stream: Stream, batch: int, length: int, seed: int, carry: bool) -> None:
        self.stream, self.batch, self.length, self.seed, self.carry = stream, batch, length, seed, carry
        self.per_epoch = (len(stream.ids) - 1) // (batch * length)
        if self.per_epoch < 1:
            raise ValueError(
                f"data: {len(stream.ids)} tokens to train on, expected more than batch * length = {batch * length}"
            )
        self._epoch = -1

    def __getitem__(self, k: int) -> Batch:
        epoch, window = divmod(k, self.per_epoch)
        self._shuffle(epoch)
        rows = [self._window(row, window) for row in range(self.batch)]
        cells = torch.stack([row for row, _ in rows])  # [batch, length + 1]
        starts = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for row, (_, begins) in enumerate(rows):
            starts[row, begins] = True
        continues = ~starts[:, 0] if self.carry and window > 0 else torch.zeros(self.batch, dtype=torch.bool)
        starts[:, 0] = True
        sequences = starts.sum(dim=1).cumsum(dim=0)
        total = self.batch * self.length
        return Batch(
            inputs=cells[:, :-1].reshape(1, total),
            targets=cells[:, 1:].reshape(1, total),
            cu_seqlens=torch.cat([starts.view(-1).nonzero().view(-1), torch.tensor([total])]),
            first=torch.cat([torch.zeros(1, dtype=torch.int64), sequences[:-1]]),
            last=sequences - 1,
            continues=continues,
        )

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        lengths = self.stream.offsets.diff()
        self._order = torch.randperm(len(lengths), generator=random)
        self._begins = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[self._order].cumsum(dim=0)])
        windows = self.batch * self.per_epoch
        shuffled = torch.arange(windows) if self.carry else torch.randperm(windows, generator=random)
        self._places = shuffled.view(self.batch, self.per_epoch)
        self._epoch = epoch

    def _window(self, row: int, window: int) -> tuple[Tensor, list[int]]:
        """length + 1 tokens of the shuffled stream, and where among the first `length` a document begins."""
        begin = int(self._places[row, window]) * self.length
        end = begin + self.length + 1
        pieces, starts = [], []
        place = int(torch.searchsorted(self._begins, begin, right=True)) - 1
        while begin < end:
            document_begin, document_end = int(self._begins[place]), int(self._begins[place + 1])
            if begin == document_begin and begin < end - 1:
                starts.append(begin - (end - self.length - 1))
            source = int(self.stream.offsets[self._order[place]]) + begin - document_begin
            size = min(end, document_end) - begin
            pieces.append(self.stream.ids[source : source + size].long())
            begin += size
            place += 1
        return torch.cat(pieces), starts


def final_rows(state: Any, batch: Batch) -> Any:
    """From the states after each sequence, [S, ...], those after each row, [batch, ...], cut off from their past."""
    return tree_map(lambda tensor: tensor.detach()[move(batch.last, tensor.device)], state)


def carried_state(rows: Any, batch: Batch) -> Any:
    """The states in which the sequences of `batch` begin, [S, ...]: the row's before it, [batch, ...], if it continues
    in the same document, else zeros."""
    if rows is None or not bool(batch.continues.any()):
        return None
    sequences = len(batch.cu_seqlens) - 1
    # Indices and not masks: how many there are is known here, and a GPU need not be asked.
    begins, continues = batch.first[batch.continues], batch.continues.nonzero()[:, 0]

    def begin(tensor: Tensor) -> Tensor:
        states = tensor.new_zeros(sequences, *tensor.shape[1:])
        states[move(begins, tensor.device)] = tensor[move(continues, tensor.device)]
        return states

    return tree_map(begin, rows)
