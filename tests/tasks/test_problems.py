"""Every task's answers against a second way to compute them, and its words against their seed."""

import pytest
import torch

from pyseq.tasks import find
from pyseq.tasks.problems import IGNORED

NAMES = ["parity", "even-pairs", "mod-arithmetic", "s3", "s5-swaps", "a5", "z60"]


@pytest.mark.parametrize("name", NAMES)
def test_words(name):
    task = find(name)
    assert task.name == name
    lengths = task.lengths(1, 9)
    assert lengths[0] == task.shortest
    for length in lengths:
        tokens, targets = task.sample(200, length, 3)
        assert tokens.shape == targets.shape == (200, 1 + length)
        assert (tokens[:, 0] == task.begin).all() and (targets[:, 0] == IGNORED).all()
        assert tokens[:, 1:].max() < task.begin and tokens.min() >= 0
        asked = targets[targets != IGNORED]
        assert len(asked) and asked.min() >= 0 and asked.max() < task.classes
        again, other = task.sample(200, length, 3), task.sample(200, length, 4)
        assert torch.equal(again[0], tokens) and torch.equal(again[1], targets)
        assert length < 3 or not torch.equal(other[0], tokens)
    if name == "mod-arithmetic":
        with pytest.raises(ValueError, match="length 5"):
            task.sample(2, 5, 0)


def test_answers_are_asked_for_at_the_end_or_everywhere():
    for name in NAMES:
        targets = find(name).sample(5, 8, 0)[1]
        asked = (targets != IGNORED).sum(1)
        assert (asked == (8 if find(name).name[0] in "saz" else 1)).all()
        assert (targets[:, -1] != IGNORED).all()


def test_parity_and_even_pairs():
    tokens, targets = find("parity").sample(100, 7, 0)
    assert torch.equal(targets[:, -1], tokens[:, 1:].sum(1) % 2)
    tokens, targets = find("even-pairs").sample(100, 7, 0)
    assert torch.equal(targets[:, -1].bool(), tokens[:, 1] == tokens[:, -1])


def test_modular_arithmetic_is_pythons():
    for length in (2, 4, 12, 31 * 2):
        tokens, targets = find("mod-arithmetic").sample(50, length, 1)
        for word, answer in zip(tokens[:, 1:].tolist(), targets[:, -1].tolist(), strict=True):
            text = "".join("01234+-*="[token] for token in word)
            assert text[-1] == "=" and eval(text[:-1]) % 5 == answer


def test_all_tokens_and_answers_occur_about_equally_often():
    for name in NAMES:
        task = find(name)
        tokens, targets = task.sample(20000, task.lengths(6, 7)[0], 0)
        kinds = torch.bincount(tokens[:, 1])
        assert kinds.min() > 0.7 * kinds.float().mean()
        answers = torch.bincount(targets[:, -1], minlength=task.classes).float()
        if name != "s5-swaps":   # an even number of swaps is an even permutation
            assert answers.min() > 0.6 * answers.mean()


def test_unknown_tasks_are_named():
    for name in ("", "tree", "q8", "a5-swaps", "s9"):
        with pytest.raises(ValueError, match="task"):
            find(name)
