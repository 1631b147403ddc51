from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from pyseq.models import CausalLM, Config
from pyseq.train.corpus import Stream
from pyseq.train.evaluate import bits_per_byte


def byte_stream(texts: list[bytes]) -> Stream:
    pieces = [[0, *text] for text in texts]
    offsets = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    return Stream(torch.tensor(list(itertools.chain(*pieces)), dtype=torch.uint8), offsets, sum(map(len, texts)))


@pytest.mark.parametrize("window", [1, 7, 30, 1000])
def test_every_byte_is_counted_once_and_predicted_from_all_before_it(window: int) -> None:
    torch.manual_seed(0)
    model = CausalLM(Config(d_model=8, n_layer=2, vocab_size=256, layer_args={"d_state": 4}))
    torch.nn.init.normal_(model.backbone.embeddings.weight, std=0.5)
    texts = [b"def f(x):\n", b"x", b"    return x ** 2 + 1\n", b"# " * 17]
    nats = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([[0, *text]])
            nats += F.cross_entropy(model(ids[:, :-1]).logits[0].double(), ids[0, 1:], reduction="sum").item()
    expected = nats / math.log(2) / sum(map(len, texts))
    assert bits_per_byte(model, byte_stream(texts), window=window) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_a_uniform_model_needs_eight_bits() -> None:
    model = CausalLM(Config(d_model=8, n_layer=1, vocab_size=256, layer_args={"d_state": 4}))
    torch.nn.init.zeros_(model.backbone.embeddings.weight)
    assert bits_per_byte(model, byte_stream([b"abc", b"defg"])) == pytest.approx(8)
