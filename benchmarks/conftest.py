"""Benchmarks: pytest-benchmark on two threads, each row with the bytes and instructions that bound it.

A bench takes the fixture `timed` and calls `timed(function, bytes=..., peer=...)`; the figures go into extra_info, and
`benchmarks/report.py` makes the table of docs/performance.md from them.
"""

import pytest
import torch

THREADS = 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds: shows that every bench runs, not how fast")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def timed(benchmark, request):
    """timed(call, who="pyseq", work="forward, A", **figures): medians of `call` under the group `work`."""

    def run(call, *, work, who="pyseq", rounds=15, **figures):
        benchmark.group = work
        benchmark.extra_info.update({"work": work, "who": who, "threads": THREADS, **figures})
        quick = request.config.getoption("--quick")
        benchmark.pedantic(call, rounds=2 if quick else rounds, iterations=1, warmup_rounds=1 if quick else 3)

    return run
