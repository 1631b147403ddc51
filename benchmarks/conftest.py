"""Benchmarks under pytest-benchmark, two threads: each names its work, its peers and what bounds it.

    compare("causal_conv1d + silu forward, A", {"pyseq": ..., "torch": ...}, targets={"torch": 8}, bytes=25e6)

times the cases in turns (benchmarks/timing.py), so that a ratio between them means something on a machine whose speed
drifts, and leaves everything in the benchmark's extra_info for benchmarks/run.py. pytest-benchmark's own statistics are
those of the first case.
"""

import functools

import pytest
import torch

from benchmarks import probe, timing
from benchmarks.peers import PeerMissing

THREADS = 2


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one round each: shows that every bench runs, not how fast")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))   # peers warn; that is theirs to mend


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@functools.cache
def machine():
    """What bounds a kernel here: bytes per second of memory, and float32 operations per second."""
    torch.set_num_threads(THREADS)
    return {"copy GB/s": probe.copy_bandwidth(), "float32 GFLOP/s": probe.float32_peak()}


@pytest.fixture
def compare(benchmark, request):
    """Callables by name, the first is ours; a value may be a function of no arguments that makes the callable.

    targets: what the ratio to a peer should be. bytes: moved at least once. flops: of the arithmetic units that bind,
    a fused multiply-add counting two. tokens: per call, where the work is one of tokens per second.
    """
    quick = request.config.getoption("--quick")

    def run(work, cases, *, targets=None, bytes=0.0, flops=0.0, tokens=None, beside=None, rounds=7):
        made, missing = {}, []
        for who, make in cases.items():
            try:
                made[who] = make()
            except PeerMissing:
                missing.append(who)
        made = {who: call for who, call in made.items() if call is not None}
        timings = timing.measure(made, rounds=1 if quick else rounds, block=0.0 if quick else 0.25, threads=THREADS,
                                 warmup=0 if quick else 1, probe=None if quick else beside)
        ours = next(iter(made.values()))
        benchmark.group = work
        benchmark.pedantic(ours, rounds=1 if quick else 5, iterations=1)
        info = {"work": work, "timings": {who: t.record() for who, t in timings.items()}, "missing": missing,
                "targets": targets or {}, "tokens": tokens, "threads": THREADS}
        if not quick and (bytes or flops):
            limits = machine()
            need = {"memory": bytes / limits["copy GB/s"] / 1e9, "arithmetic": flops / limits["float32 GFLOP/s"] / 1e9}
            info |= {"bound": max(need.values()), "bound_by": max(need, key=need.get), "machine": limits}
        benchmark.extra_info.update(info)

    return run
