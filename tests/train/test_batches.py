from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyseq.models import CausalLM, Config
from pyseq.train.batches import Batch, Batches, carried_state, final_rows
from pyseq.train.corpus import Stream


def stream_of(lengths: list[int]) -> Stream:
    """Documents whose tokens are all different: the position in the stream."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Stream(torch.arange(int(offsets[-1]), dtype=torch.int32), offsets, int(offsets[-1]) - len(lengths))


def segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    cu = batch.cu_seqlens.tolist()
    return [(batch.inputs[0, a:b].tolist(), batch.targets[0, a:b].tolist()) for a, b in itertools.pairwise(cu)]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    carry=st.booleans(),
    seed=st.integers(0, 3),
)
def test_an_epoch_reads_each_document_in_order_and_nothing_twice(
    lengths: list[int], batch: int, length: int, carry: bool, seed: int
) -> None:
    stream = stream_of(lengths)
    if len(stream.ids) - 1 < batch * length:
        with pytest.raises(ValueError, match="tokens to train on"):
            Batches(stream, batch, length, seed, carry)
        return
    batches = Batches(stream, batch, length, seed, carry)
    starts = set(stream.offsets.tolist())
    seen: list[int] = []
    for k in range(batches.per_epoch):
        for inputs, targets in segments(batches[k]):
            seen += inputs
            assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))  # one document, in order
            assert not starts & set(inputs[1:])
            assert targets[:-1] == inputs[1:]
            assert targets[-1] == inputs[-1] + 1 or (inputs[-1] + 1 in starts and targets[-1] in starts)
    assert len(seen) == len(set(seen)) == batch * length * batches.per_epoch
    assert len(stream.ids) - len(seen) <= batch * length


def test_a_batch_is_a_function_of_its_number() -> None:
    stream = stream_of([30, 7, 22, 41])
    one, other = Batches(stream, 2, 5, 0, True), Batches(stream, 2, 5, 0, True)
    there = [one[k] for k in range(25)]
    back = [other[k] for k in reversed(range(25))][::-1]
    assert all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.continues, b.continues)
        for a, b in zip(there, back, strict=True)
    )
    assert not torch.equal(Batches(stream, 2, 5, 1, True)[0].inputs, one[0].inputs)
    assert not torch.equal(one[0].inputs, one[one.per_epoch].inputs)


def test_a_row_continues_only_inside_a_document_and_an_epoch() -> None:
    batches = Batches(stream_of([30, 7, 22, 41]), 2, 5, 0, True)
    for k in range(1, 3 * batches.per_epoch):
        before, now = batches[k - 1], batches[k]
        ends, begins = before.inputs.view(2, 5)[:, -1], now.inputs.view(2, 5)[:, 0]
        expected = (begins == ends + 1) & ~torch.isin(begins, batches.stream.offsets)
        if k % batches.per_epoch == 0:
            expected[:] = False
        assert torch.equal(now.continues, expected)
    assert not Batches(stream_of([100]), 2, 5, 0, False)[1].continues.any()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_with_the_state_carried_a_document_read_in_windows_is_read_whole(batch: int) -> None:
    torch.manual_seed(0)
    model = CausalLM(Config(d_model=8, n_layer=2, vocab_size=104, layer_args={"d_state": 4})).eval()
    stream = stream_of([30, 7, 12, 1, 10, 41])
    batches = Batches(stream, batch, 5, 0, True)
    rows, logits = None, {}
    with torch.no_grad():
        for k in range(batches.per_epoch):
            now = batches[k]
            out = model(now.inputs, carried_state(rows, now), cu_seqlens=now.cu_seqlens)
            rows = final_rows(out.state, now)
            logits.update(zip(now.inputs[0].tolist(), out.logits[0], strict=True))
        row_begins = set(batches[0].inputs.view(batch, 5)[:, 0].tolist())
        checked = 0
        for begin, end in itertools.pairwise(stream.offsets.tolist()):
            whole_in_a_row = not row_begins & set(range(begin + 1, end))
            if whole_in_a_row and all(i in logits for i in range(begin, end)):
                whole = model(torch.arange(begin, end)[None]).logits[0]
                parts = torch.stack([logits[i] for i in range(begin, end)])
                torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
                checked += 1
    assert checked >= 2
