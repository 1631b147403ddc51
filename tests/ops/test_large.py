"""Past 2^31 elements: the last tokens of one long sequence equal those of its last piece, computed from the state."""

import pytest
import torch

import pyseq

DIM, TAIL = 512, 64
TIME = 2**31 // DIM + 4096   # 2^31 + 2^21 elements: 4.3 GB of bfloat16 each

pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def x():
    x = torch.empty(1, TIME, DIM, dtype=torch.bfloat16)
    x.view(-1, 2**20)[:] = torch.randn(2**20).to(torch.bfloat16)
    x[:, -TAIL:] = torch.randn(1, TAIL, DIM).to(torch.bfloat16)
    return x


def test_causal_conv1d(x):
    weight = torch.randn(DIM, 4)
    with torch.no_grad():
        y, last = pyseq.causal_conv1d(x, weight, activation="silu", return_state=True)
        state = x[0, -TAIL - 3 : -TAIL].float().T[None].contiguous()
        tail, after = pyseq.causal_conv1d(x[:, -TAIL:], weight, activation="silu", state=state, return_state=True)
    assert torch.equal(y[:, -TAIL:], tail) and torch.equal(last, after)


def test_selective_scan(x):
    A, B = -torch.rand(DIM, 4), torch.randn(1, TIME, 4)
    rest = {"A": A, "dt_bias": torch.zeros(DIM), "dt_softplus": True, "return_state": True}
    with torch.no_grad():
        y, last = pyseq.selective_scan(x, x, B=B, C=B, **rest)
        _, state = pyseq.selective_scan(x[:, :-TAIL], x[:, :-TAIL], B=B[:, :-TAIL], C=B[:, :-TAIL], **rest)
        tail, after = pyseq.selective_scan(
            x[:, -TAIL:], x[:, -TAIL:], B=B[:, -TAIL:], C=B[:, -TAIL:], state=state, **rest
        )
    assert torch.equal(y[:, -TAIL:], tail) and torch.equal(last, after)


def test_rms_norm_gated(x):
    weight = torch.rand(DIM)
    with torch.no_grad():
        y = pyseq.rms_norm_gated(x, weight, x)
        assert torch.equal(y[:, -TAIL:], pyseq.rms_norm_gated(x[:, -TAIL:], weight, x[:, -TAIL:]))
