"""Groups against their axioms, and products against multiplication one by one."""

import itertools

import pytest
import torch

from pyseq.tasks import group

ORDERS = {"S3": 6, "S4": 24, "A4": 12, "S5": 120, "A5": 60, "Z60": 60, "Z1": 1, "A4xZ5": 60, "Z2xZ2": 4, "S1": 1}


def product(g, a, b):
    return g.products(torch.stack(torch.broadcast_tensors(a, b), -1).view(-1, 2))[:, 1]


@pytest.mark.parametrize("name", ORDERS)
def test_a_group_is_one(name):
    g = group(name)
    assert g.order == ORDERS[name] and g.name == name
    x = torch.arange(g.order)
    table = product(g, x[:, None], x[None]).view(g.order, g.order)
    assert torch.equal(table[0], x) and torch.equal(table[:, 0], x)   # 0 is the identity
    for line in (table, table.T):
        assert torch.equal(line.sort(1).values, x.expand(g.order, -1))   # every equation has one solution
    torch.manual_seed(0)
    words = torch.randint(g.order, (20, 30))
    acc = torch.zeros(20, dtype=torch.int64)
    for t, got in enumerate(g.products(words).unbind(1)):
        acc = table[acc, words[:, t]]
        assert torch.equal(got, acc)
    a, b, c = torch.randint(g.order, (3, 50))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


def test_permutations_compose_from_the_right_and_are_numbered_in_order():
    g = group("S4")
    listed = list(itertools.permutations(range(4)))
    for a, b in itertools.product(range(0, 24, 5), range(24)):
        both = tuple(listed[a][listed[b][i]] for i in range(4))
        assert listed[int(g.products(torch.tensor([[a, b]]))[0, 1])] == both
    assert torch.equal(g.factors[0].rank(g.factors[0].elements), torch.arange(24))
    assert torch.equal(group("A5").factors[0].rank(group("A5").factors[0].elements), torch.arange(60))


def test_only_abelian_groups_commute():
    for name, abelian in {"S3": False, "A5": False, "Z60": True, "Z2xZ2": True, "A4xZ5": False}.items():
        g = group(name)
        x = torch.arange(g.order)
        table = product(g, x[:, None], x[None]).view(g.order, g.order)
        assert torch.equal(table, table.T) == abelian


def test_swaps():
    for n in (2, 3, 5):
        g = group(f"S{n}")
        swaps = g.swaps()
        assert len(swaps) == n * (n - 1) // 2
        assert not product(g, swaps, swaps).any()   # each undoes itself
    for name in ("A4", "Z6", "S3xZ2"):
        with pytest.raises(ValueError, match="no swaps"):
            group(name).swaps()


@pytest.mark.parametrize("name", ["", "S", "S0", "Q8", "S9", "A4x", "5", "S5 "])
def test_wrong_names(name):
    with pytest.raises(ValueError, match="group"):
        group(name)
