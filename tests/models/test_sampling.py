"""Which tokens may be drawn, with which probabilities."""

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyseq.models import sampling
from pyseq.models.sampling import draw, penalise, sample

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0, float("-inf")]])


def uniform(rows=1, seed=0):
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))


def candidates(*args):
    weights, ids = sampling.candidates(*args)
    assert weights.dtype == torch.int64
    return weights / weights.sum(-1, keepdim=True), ids


def weights(*probs):
    return (torch.tensor([probs]) * 2.0**40).long()


def frequencies(logits, n=4000, **options):
    drawn = torch.stack([sample(logits, u, **options) for u in uniform(n).expand(n, len(logits))[..., None]])
    return torch.stack([(drawn == i).float().mean(0) for i in range(logits.shape[-1])], -1)


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [4.0, 0.0, 0.0]])
    assert sample(logits, uniform(2), temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_plain_sampling_follows_softmax(temperature):
    got = frequencies(LOGITS, temperature=temperature)
    assert (got - (LOGITS / temperature).softmax(-1)).abs().max() < 0.03
    assert got[0, 4] == 0


def test_tiny_temperature_does_not_overflow():
    assert sample(LOGITS * 1e30, uniform(), temperature=1e-30).item() == 0


def test_top_k_keeps_k():
    probs, ids = candidates(LOGITS, 1.0, 2, None)
    assert ids.tolist() == [[0, 2]]
    assert torch.allclose(probs, torch.tensor([[2.0, 1.0]]).softmax(-1))
    assert candidates(LOGITS, 1.0, 99, None)[0].shape == (1, 5)
    assert set(frequencies(LOGITS, 300, top_k=1)[0].nonzero()[:, 0].tolist()) == {0}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for p, kept in [(1e-9, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)]:
        probs, ids = candidates(logits, 1.0, None, p)
        assert ((probs > 0).sum(), ids[0, :kept].tolist()) == (kept, list(range(kept)))
        assert torch.allclose(probs.sum(-1), torch.ones(1))
    assert candidates(logits, 1.0, None, 1.0)[1] is None


def test_top_p_over_a_flat_vocabulary():
    """More candidates than the first guess of 64, and a row that needs few beside one that needs many."""
    logits = torch.zeros(2, 1000)
    logits[1, 7] = 30.0
    probs, ids = candidates(logits, 1.0, None, 0.9)
    assert abs(int((probs[0] > 0).sum()) - 900) <= 1
    assert probs[1, 0] == 1 and ids[1, 0] == 7


def test_top_p_after_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    probs, _ = candidates(logits, 1.0, 2, 0.5)  # of the two, the first has 4/7
    assert probs.tolist() == [[1.0, 0.0]]


def test_penalty_divides_positive_and_multiplies_negative_logits():
    seen = torch.tensor([[True, True, False, True, False]])
    assert penalise(LOGITS, seen, 2.0).tolist() == [[1.0, 0.0, 1.0, -2.0, float("-inf")]]


def test_impossible_tokens_are_never_drawn():
    halves = weights(0.0, 0.5, 0.0, 0.5, 0.0).expand(4096, 5)
    assert set(draw(halves, uniform(4096)).tolist()) == {1, 3}


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval(u):
    for probs in ([0.0, 1.0, 0.0], [0.0, 0.3, 0.7], [1e-30, 1.0, 0.0], [0.0, 1.0] * 100000):
        row = weights(*probs)
        assert row[0, draw(row, torch.tensor([[u]])).item()] > 0


def test_a_draw_is_exact():
    """Where the product of u and the total fits a double, against fractions; beyond it is off by 2^-53."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 2**18, (1, 1000), generator=generator) * torch.randint(0, 2, (1, 1000), generator=generator)
    cumulative = list(accumulate(row[0].tolist()))
    for u in uniform(500):
        want = bisect_right(cumulative, Fraction(u.item()) * cumulative[-1] // 1)
        assert draw(row, u[None]).item() == want


class NoFloatScan(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        scans = func._overloadpacket.__name__ in ("cumsum", "cumsum_", "cumprod", "logcumsumexp")
        assert not scans or not args[0].is_floating_point(), "its bits differ from run to run on a GPU"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.5}])
def test_no_floats_are_summed_in_an_order_of_the_devices_choice(options):
    with NoFloatScan():
        sample(torch.zeros(2, 300), uniform(2), **options)


def test_the_order_of_the_vocabulary_does_not_change_the_nucleus():
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 3
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    (a, ids), (b, places) = (sampling.candidates(x, 0.7, None, 0.95) for x in (logits, logits[:, order]))
    assert torch.equal(a, b) and torch.equal(ids[a > 0], order[places[b > 0]])


def test_seed_decides():
    logits = torch.randn(4, 50)
    first, again, other = (sample(logits, uniform(4, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
