"""Nothing to learn: with kappa = (e_i - e_j) / sqrt 2, a = -kappa and b = 2 kappa the delta rule swaps rows i and j of
its state, and a state that begins as the identity matrix follows any product of swaps in S_5."""

import pytest
import torch

import pyseq
from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.ops.delta_rule import CHUNKS, SEQUENTIAL
from pyseq.tasks import find, group

N, LENGTH, BATCH = 5, 200, 3
TASK = find("s5-swaps")
PERMUTATIONS = group("S5").factors[0]


def words():
    """Swaps [B, T], and the number of their product after each."""
    tokens, targets = TASK.sample(BATCH, LENGTH, 7)
    return TASK.alphabet[tokens[:, 1:]], targets[:, 1:]


def inputs(swaps):
    """q reads row h in head h; kappa is the same in all heads; nothing is written."""
    moved = PERMUTATIONS.elements[swaps] != torch.arange(N)   # [B, T, N], two of them
    first = moved.long().argmax(-1, keepdim=True)
    kappa = moved * torch.where(torch.arange(N) == first, 1.0, -1.0) / 2**0.5
    kappa = kappa[:, :, None].repeat(1, 1, N, 1)
    q = torch.eye(N).repeat(BATCH, swaps.shape[1], 1, 1)
    return q, kappa, torch.zeros_like(q), torch.eye(N).repeat(BATCH, N, 1, 1)


def judge(y, products):
    """y [B, T, 5, 5]: row h is that of the point to which the product takes h."""
    rounded = y.round()
    assert (y - rounded).abs().max() < 1e-4
    assert torch.equal(rounded.sum(-1), torch.ones_like(rounded[..., 0]))
    assert torch.equal(PERMUTATIONS.rank(rounded.argmax(-1)), products)


@pytest.mark.parametrize("form", [SEQUENTIAL, CHUNKS])
@pytest.mark.parametrize("backend", testing.backends(REGISTRY["delta_rule"]))
def test_delta_rule(backend, form):
    swaps, products = words()
    q, kappa, none, state = inputs(swaps)
    with testing.on(backend) as device:
        arguments = (t.to(device) for t in (q, none, none, -kappa, 2 * kappa))
        kernels = REGISTRY["delta_rule"].active
        y, last, _ = kernels.forward(*arguments, None, state.to(device), None, 1.0, True, False, form)
    judge(y.cpu(), products)
    judge(last.cpu()[:, :1].expand(-1, LENGTH, -1, -1)[:, -1:], products[:, -1:])


@pytest.mark.parametrize("form", [SEQUENTIAL, CHUNKS])
@pytest.mark.parametrize("backend", testing.backends(REGISTRY["gated_delta_rule"]))
def test_gated_delta_rule(backend, form):
    """The same with tied keys: k = kappa, beta = 2, v = 0."""
    swaps, products = words()
    q, kappa, none, state = inputs(swaps)
    with testing.on(backend) as device:
        arguments = (t.to(device) for t in (q, kappa, none))
        beta = torch.full(q.shape[:3], 2.0, device=device)
        kernels = REGISTRY["gated_delta_rule"].active
        y, _, _ = kernels.forward(*arguments, None, beta, state.to(device), None, 1.0, True, False, form)
    judge(y.cpu(), products)


@pytest.mark.parametrize("backend", testing.backends(REGISTRY["delta_rule"]))
def test_step_by_step(backend):
    swaps, products = words()
    q, kappa, none, state = inputs(swaps)
    with testing.on(backend) as device:
        state, ys = state.to(device), []
        for t in range(60):
            token = (u[:, t].to(device) for u in (q, none, none, -kappa, 2 * kappa))
            ys.append(pyseq.delta_rule_step(state, *token, None))
    judge(torch.stack(ys, 1).cpu(), products[:, :60])


def test_in_float64_and_with_the_public_function():
    swaps, products = words()
    q, kappa, none, state = inputs(swaps)
    y = pyseq.delta_rule(q, none, none, -kappa, 2 * kappa, None, state=state)
    judge(y, products)
    q, kappa, none, state = (t.double() for t in (q, kappa, none, state))
    judge(pyseq.delta_rule(q, none, none, -kappa, 2 * kappa, None, state=state), products)
