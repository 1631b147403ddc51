"""cp.async, named barriers and mbarriers: the faultless kernels are right, and each fault in them shows."""

import pytest
import torch
from emulated import LAUNCH_FAILURE, fails, in_every_order, nan, needs_toolkit, results, run

pytestmark = needs_toolkit
NO_WAIT, TOO_WEAK_WAIT, NO_BARRIER, NO_SECOND_BARRIER, MISALIGNED, UNCOMMITTED, NEVER_WAITED = range(1, 8)
NO_ARRIVAL, NO_FULL_WAIT, NO_EMPTY_WAIT, NOT_INITIALISED, NO_BARRIER_AFTER_INIT, WRONG_COUNT = range(1, 7)
MISSING, OTHER_BARRIER, ODD_COUNT, ALONE = range(1, 5)

X = torch.arange(1.0, 1.0 + 64 * 4)


def reversed_tiles(n):
    padded = torch.nn.functional.pad(X[:n], (0, -n % 64))
    return padded.view(-1, 64).flip(1).flatten()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("n", [1, 63, 64, 130, 241])
def test_copies_arrive(lib, n, size):
    x = X[:n].clone()
    y = in_every_order(lib, "reverse_tiles", lambda: (x, nan((n + 63) // 64 * 64), n, size, 0), 1)
    assert torch.equal(y, reversed_tiles(n))


@pytest.mark.parametrize("fault", [NO_WAIT, TOO_WEAK_WAIT, UNCOMMITTED])
def test_copy_that_nobody_waits_for_is_named(watched, fault):
    for message in fails(watched, "reverse_tiles", X, nan(256), 256, 16, fault):
        assert "race in shared memory" in message and ", with no wait between" in message
        assert "reads at pipeline.cu:" in message and "copies at pipeline.cu:" in message


@pytest.mark.parametrize("fault", [NO_WAIT, TOO_WEAK_WAIT, UNCOMMITTED])
def test_copy_that_nobody_waits_for_shows(plain, fault):
    y = nan(256)
    assert run(plain, (0, 0), "reverse_tiles", X, y, 256, 16, fault) in (0, LAUNCH_FAILURE)
    assert y.isnan().any()


@pytest.mark.parametrize("size", [4, 16])
def test_missing_barrier_after_the_wait(plain, watched, size):
    y = results(plain, "reverse_tiles", lambda: (X, nan(256), 256, size, NO_BARRIER), 1)
    assert any(not torch.equal(v, reversed_tiles(256)) for v in y)
    for message in fails(watched, "reverse_tiles", X, nan(256), 256, size, NO_BARRIER):
        assert "race in shared memory" in message


def test_copy_into_what_others_still_read(watched):
    for message in fails(watched, "reverse_tiles", X, nan(256), 256, 4, NO_SECOND_BARRIER):
        assert "race in shared memory" in message and "copies at pipeline.cu:" in message


@pytest.mark.parametrize("size", [8, 16])
def test_misaligned_copy_is_named(lib, size):
    for message in fails(lib, "reverse_tiles", X, nan(256), 256, size, MISALIGNED):
        assert "in cp_async at pipeline.cu:" in message and "destination that is not aligned" in message
    for message in fails(lib, "reverse_tiles", X[1:].clone()[1:], nan(256), 254, 16, 0):
        assert "in cp_async at pipeline.cu:" in message and "source that is not aligned" in message


def test_copy_in_flight_at_the_end_is_named(lib):
    for message in fails(lib, "reverse_tiles", X, nan(256), 256, 16, NEVER_WAITED):
        assert "exits with 1 cp.async that it did not wait for" in message


def test_ring_of_mbarriers(lib):
    rounds = 7
    y = in_every_order(lib, "ring", lambda: (X[:32], nan(32), rounds, 0), 1)
    assert torch.equal(y, X[:32].clone() * sum(range(rounds)))


@pytest.mark.parametrize("fault", [NO_ARRIVAL, WRONG_COUNT])
def test_phase_that_never_completes_is_divergence(lib, fault):
    for message in fails(lib, "ring", X, nan(32), 7, fault):
        assert "divergence, no thread can go on:" in message and "wait in mbarrier_wait at pipeline.cu:" in message


def test_mbarrier_that_was_not_initialised(lib):
    for message in fails(lib, "ring", X, nan(32), 7, NOT_INITIALISED):
        assert "an mbarrier that was not initialised" in message


@pytest.mark.parametrize("fault", [NO_FULL_WAIT, NO_EMPTY_WAIT])
def test_missing_wait_for_an_mbarrier(watched, fault):
    messages = fails(watched, "ring", X, nan(32), 7, fault)
    assert any("race in shared memory" in m for m in messages)
    assert all("race" in m or "divergence" in m for m in messages)   # a consumer far ahead ends phases too early


def test_missing_barrier_after_the_initialisation(watched):
    messages = fails(watched, "ring", X, nan(32), 7, NO_BARRIER_AFTER_INIT)
    assert any("race" in m for m in messages)
    assert all("race" in m or "not initialised" in m for m in messages)


def test_named_barriers(lib):
    v = X[:128].clone()
    for r in range(5):
        swapped = v.view(2, 2, 32).flip(1).flatten()
        v = torch.cat([v[:64] + swapped[:64] if r < 3 else v[:64], v[64:] + swapped[64:]])
    assert torch.equal(in_every_order(lib, "pairs", lambda: (X, nan(128), 3, 0), 1), v)


def test_missing_named_barrier_is_named(watched):
    for message in fails(watched, "pairs", X, nan(128), 3, MISSING):
        assert "race in shared memory" in message


@pytest.mark.parametrize("fault", [OTHER_BARRIER, ALONE])
def test_named_barrier_that_too_few_come_to(lib, fault):
    for message in fails(lib, "pairs", X, nan(128), 3, fault):
        assert "divergence, no thread can go on:" in message and "wait in named_barrier at pipeline.cu:" in message


def test_named_barrier_checks_its_count(lib):
    for message in fails(lib, "pairs", X, nan(128), 3, ODD_COUNT):
        assert "in named_barrier at pipeline.cu:" in message and "63 threads" in message
