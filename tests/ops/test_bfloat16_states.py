"""What a step that rounds its state to bfloat16 keeps, and what it never forgets: the limit that the pages state."""

import math

import pytest
import torch

import pyseq

# Every bfloat16 value from 1 to 2: eight significant bits.
VALUES = 1 + torch.arange(128) / 128
ONE = torch.ones(1)


def ssd(state, x, step):
    return pyseq.ssd_step(state.view(1, 1, 1, -1), x.view(1, 1, 1), step * ONE.view(1, 1), -ONE,
                          torch.ones(1, 1, 128), torch.full((1, 1, 128), 1 / 128))  # fmt: skip


def scan(state, x, step):
    return pyseq.selective_scan_step(state.view(1, 1, -1), x.view(1, 1), step * ONE.view(1, 1), -torch.ones(1, 128),
                                     torch.ones(1, 128), torch.full((1, 128), 1 / 128))  # fmt: skip


def average(state, x, step):
    return pyseq.ema_step(state.view(1, -1), x.expand(1, 128), -math.expm1(-step) * ONE)


every_step = pytest.mark.parametrize("step", [ssd, scan, average])


@every_step
def test_what_forgets_fast_is_as_exact_as_its_digits(step):
    """A twentieth a token: as many roundings as count are few, and of either sign."""
    draws = torch.randn(400, generator=torch.Generator().manual_seed(0))
    exact, half = torch.zeros(128), torch.zeros(128, dtype=torch.bfloat16)
    pairs = [(step(exact, x, 0.05).mean(), step(half, x, 0.05).mean()) for x in draws]
    want, got = (torch.stack(values) for values in zip(*pairs, strict=True))
    assert 0 < (got - want).norm() < 0.01 * want.norm()


@every_step
def test_what_forgets_slowly_never_does(step):
    """A thousandth a token: a third is forgotten in 400 tokens, of a bfloat16 state nothing."""
    exact, half = VALUES.clone(), VALUES.bfloat16()
    for _ in range(400):
        step(exact, torch.zeros(1), 2**-10)
        step(half, torch.zeros(1), 2**-10)
    torch.testing.assert_close(exact, VALUES * math.exp(-400 * 2**-10), rtol=1e-5, atol=0)
    assert torch.equal(half.float(), VALUES)


@every_step
def test_the_threshold_is_a_step_of_2_to_the_minus_9(step):
    for size, stays in ((2**-9, True), (1.1 * 2**-8, False)):
        half = VALUES.bfloat16()
        step(half, torch.zeros(1), size)
        assert ((half.float() == VALUES) == stays).all()
