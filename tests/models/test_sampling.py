"""Which tokens may be drawn, with which probabilities."""

import pytest
import torch

from pyseq.models.sampling import candidates, draw, penalise, sample

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0, float("-inf")]])


def uniform(rows=1, seed=0):
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))


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
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4096, 5)
    assert set(draw(probs, uniform(4096)).tolist()) == {1, 3}




@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval(u):
    for probs in ([0.0, 1.0, 0.0], [0.0, 0.3, 0.7], [1e-30, 1.0, 0.0], [0.0, 1e-38, 0.0]):
        drawn = draw(torch.tensor([probs]), torch.tensor([[u]])).item()
        assert probs[drawn] > 0


def test_seed_decides():
    logits = torch.randn(4, 50)
    first, again, other = (sample(logits, uniform(4, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
