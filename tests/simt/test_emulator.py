"""The emulator itself: faultless kernels give the right numbers in every order, and every planted fault shows."""

import ctypes
import re
import shutil
import subprocess

import pytest
import torch
from emulated import (
    CSRC,
    HERE,
    LAUNCH_FAILURE,
    ORDERS,
    compile_cpp,
    fails,
    in_every_order,
    nan,
    needs_toolkit,
    results,
    run,
)

from pyseq._library import HAS_SIMT

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t
pytestmark = needs_toolkit


def test_scan(lib):
    gen = torch.Generator().manual_seed(0)
    rows, time = 5, 300
    a, x = torch.rand(rows, time, generator=gen) / 2 + 0.5, torch.randn(rows, time, generator=gen)
    before = lib.launches(b"scan_kernel<128>")
    h = in_every_order(lib, "scan", lambda: (a, x, nan(rows, time), rows, time), 2)
    want = torch.empty(rows, time, dtype=torch.float64)
    state = torch.zeros(rows, dtype=torch.float64)
    for t in range(time):
        want[:, t] = state = a[:, t].double() * state + x[:, t].double()
    torch.testing.assert_close(h.double(), want, rtol=1e-5, atol=1e-5)
    assert lib.launches(b"scan_kernel<128>") - before == len(ORDERS)


def test_tree_sum(lib):
    x = torch.randn(7 * 500, generator=torch.Generator().manual_seed(1))
    make = lambda: (x, nan(7), torch.zeros(1, dtype=torch.int32), 7, len(x))  # noqa: E731
    y = in_every_order(lib, "tree_sum", make, 1)
    torch.testing.assert_close(y.double(), x.view(7, 500).double().sum(1), rtol=1e-5, atol=1e-5)
    assert in_every_order(lib, "tree_sum", make, 2).item() == 7 * 63


@pytest.mark.parametrize("n", [1, 31, 77, 128, 250])
def test_threads_that_exit_early_are_not_waited_for(lib, n):
    x = torch.arange(1, n + 1, dtype=torch.int32)
    warps = -(-n // 32)
    make = lambda: (x, torch.full_like(x, -1), torch.full((warps,), -1, dtype=torch.int32), n)  # noqa: E731
    assert torch.equal(in_every_order(lib, "early_exit", make, 1), x.flip(0))
    sums = torch.nn.functional.pad(x, (0, warps * 32 - n)).view(warps, 32).sum(1).int()
    assert torch.equal(in_every_order(lib, "early_exit", make, 2), sums)


@pytest.mark.parametrize("width", [2, 8, 32])
def test_warp_collectives(lib, width):
    x = torch.randint(-50, 50, (32,), generator=torch.Generator().manual_seed(width), dtype=torch.int32)
    out = in_every_order(lib, "collectives", lambda: (x, torch.full((32, 14), -(2**60)), width), 1).tolist()
    v = x.tolist()
    ballot = sum(1 << i for i in range(32) if v[i] > 0)
    orred = 0
    for value in v:
        orred |= value & 0xFFFFFFFF
    for i, row in enumerate(out):
        first = i // width * width
        assert row[0] == v[first + 3 % width]
        assert row[1] == v[i - 3 if i - 3 >= first else i]
        assert row[2] == v[i + 3 if i + 3 < first + width else i]
        assert row[3] == v[i ^ 5 if (i ^ 5) < first + width else i]
        assert row[4] & 0xFFFFFFFF == ballot
        assert row[5:7] == [int(7 in v), 1]
        assert row[7:10] == [sum(v), min(v), max(v)]
        assert row[10] == orred
        assert row[11] == v[i ^ (1 if i < 16 else 2)]
        assert row[12] == v[min(i + 1, 31)]
        assert row[13] == sum(value > 0 for value in (v[:16] if i < 16 else v[16:]))


@pytest.mark.parametrize("name, dtype", [("scale_bf16", torch.bfloat16), ("scale_fp16", torch.float16)])
def test_half_precision_rounds_like_torch(lib, name, dtype):
    values = torch.tensor([0.0, -0.0, 1e-8, 6e-8, 1e-40, 3.4e38, -torch.inf, torch.nan, 65519.0, 65520.0])
    x = torch.cat([values, torch.randn(999, generator=torch.Generator().manual_seed(2))]).to(dtype)
    y = in_every_order(lib, name, lambda: (x, torch.full_like(x, torch.nan), 0.3, len(x)), 1)
    torch.testing.assert_close(y, (x.float() * torch.tensor(0.3)).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_block_sum_gives_all_threads_the_same_bits(lib):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(3))
    y = in_every_order(lib, "moments", lambda: (x, nan(3, 96, 2), 3, 1000), 1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    want = torch.stack([x.double().sum(1), x.double().square().sum(1)], 1)
    torch.testing.assert_close(y[:, 0].double(), want, rtol=1e-5, atol=1e-4)


def test_approximate_functions_are_exact_without_noise(lib):
    x = torch.linspace(0.01, 20, 100)
    y = in_every_order(lib, "functions", lambda: (x, nan(5, 100), 100), 1)
    v = x.double()
    want = torch.stack([v.exp2(), v.log2(), 1 / v, v.tanh(), torch.nn.functional.softplus(v, threshold=99)])
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-7)


def test_half_warps_order_their_memory(lib):
    x = torch.arange(1, 65, dtype=torch.int32)
    make = lambda: (x, torch.full_like(x, -1), torch.zeros(1, dtype=torch.int32))  # noqa: E731
    assert torch.equal(in_every_order(lib, "half_warps", make, 1), x.view(4, 16).flip(1).flatten())
    assert in_every_order(lib, "half_warps", make, 2).item() == 32


@pytest.mark.parametrize(
    "grid, block, smem, error",
    [
        ((1, 1, 1), (1024, 1, 1), 0, 0),
        ((1, 1, 1), (1, 1, 64), 227 * 1024, 0),
        ((3, 4, 5), (33, 2, 1), 0, 0),
        ((1, 1, 1), (1025, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (64, 32, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (1, 1, 65), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (0, 1, 1), 0, INVALID_CONFIGURATION),
        ((0, 1, 1), (32, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 65536, 1), (32, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 65536), (32, 1, 1), 0, INVALID_CONFIGURATION),
        ((1, 1, 1), (32, 1, 1), 227 * 1024 + 1, INVALID_VALUE),
    ],
)
def test_launches_that_cuda_refuses(lib, grid, block, smem, error):
    uint3 = ctypes.c_uint * 3
    before = lib.launches(b"nothing_kernel")
    assert lib.nothing(uint3(*grid), uint3(*block), ctypes.c_size_t(smem)) == error
    assert lib.launches(b"nothing_kernel") - before == (error == 0)
    if error:
        assert b"nothing_kernel: " in lib.last_error()


X = torch.arange(1.0, 129.0)


def test_missing_barrier_shows_in_the_results(plain):
    y = results(plain, "missing_barrier", lambda: (X, nan(128), 4), 1)
    assert any(not torch.equal(v, y[0]) for v in y)


def test_read_before_the_first_barrier_shows_in_the_results(plain):
    assert all(v.isnan().any() for v in results(plain, "early_read", lambda: (X, nan(128)), 1))


RACES = [("missing_barrier", (X, nan(128), 4)), ("early_read", (X, nan(128))), ("unordered_lanes", (X, nan(32)))]


@pytest.mark.parametrize("name, args", RACES)
def test_race_is_named(watched, name, args):
    where = r"planted\.cu:\d+"
    race = rf"thread \d+ (reads|writes) at {where} what thread \d+ (read|wrote) at {where}, with no barrier between"
    for message in fails(watched, name, *args):
        assert re.fullmatch(rf"{name}_kernel, block \(0, 0, 0\): race in shared memory: {race}", message)


def test_divergent_shuffle_shows(lib):
    (message,) = fails(lib, "divergent_shuffle", X, nan(64), 5)
    assert message.startswith("divergent_shuffle_kernel, block (0, 0, 0): divergence, no thread can go on:")
    assert "lanes 0x0000001f of warp 0 wait in __shfl_xor_sync(mask 0xffffffff) at planted.cu:" in message
    assert "lanes 0xffffffe0 of warp 0 wait in __syncthreads at planted.cu:" in message


def test_shuffle_of_a_whole_mask_is_no_divergence(lib):
    y = in_every_order(lib, "divergent_shuffle", lambda: (X, nan(64), 32), 1)
    assert torch.equal(y[:4], torch.tensor([3.0, 3.0, 7.0, 7.0])) and torch.equal(y[32:], X[32:64])


def test_divergent_barrier_shows(lib):
    for message in fails(lib, "divergent_barrier", X, nan(64), 40):
        assert "is in __syncthreads at planted.cu:" in message and ", others are in __syncthreads at" in message


def test_lanes_in_different_collectives_show(lib):
    for message in fails(lib, "mixed_collectives", X.int(), X.int()):
        assert "__shfl_xor_sync(mask 0xffffffff)" in message and "__ballot_sync(mask 0xffffffff)" in message


def test_lane_outside_its_mask_shows(lib):
    (message,) = fails(lib, "wrong_mask", X.int())
    assert "thread 31 is in __any_sync(mask 0x7fffffff)" in message and "whose mask leaves it out" in message


def test_shuffle_from_outside_the_mask_gives_poison(lib):
    y = in_every_order(lib, "half_mask", lambda: (X, torch.zeros(32)), 1)
    assert torch.equal(y[::2], X[1:32:2]) and y[1::2].isnan().all()


def test_lane_that_exited_gives_poison(lib):
    y = in_every_order(lib, "exited_lane", lambda: (X, torch.zeros(32)), 1)
    assert y.isnan().sum() == 31 and y[5] == 0


@pytest.mark.parametrize("name", ["stale_static", "stale_dynamic"])
def test_shared_memory_of_an_earlier_block_shows(lib, name):
    y = in_every_order(lib, name, lambda: (X, torch.zeros(4, 32), 4), 1)
    assert torch.equal(y[0], X[:32]) and y[1:].isnan().all()


def test_unwritten_dynamic_shared_memory_shows(lib):
    assert in_every_order(lib, "unwritten_dynamic", lambda: (X, torch.zeros(1), 60), 1).isnan().all()


def test_block_that_needs_another_shows(lib):
    y = results(lib, "cross_block", lambda: (X, nan(9), 9), 1)
    assert torch.equal(y[0], X[:9].cumsum(0))  # ascending hides it
    assert all(v.isnan().any() for v, (_, block_order) in zip(y, ORDERS, strict=True) if block_order)


def test_unwritten_output_shows(lib):
    y = in_every_order(lib, "unwritten_output", lambda: (X, nan(128), 128), 1)
    assert y.isnan().nonzero().tolist() == [[127]]


def test_emulator_is_as_good_as_new_after_a_failed_launch(lib):
    assert run(lib, (0, 0), "divergent_shuffle", X, nan(64), 5) == LAUNCH_FAILURE
    test_scan(lib)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    path = tmp_path_factory.mktemp("simt") / "out_of_bounds"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return compile_cpp(HERE / "out_of_bounds.cpp", path, "-O1", *sanitizers)


@pytest.mark.parametrize(
    "fault, report",
    [
        ("none", None),
        ("past_global", "heap-buffer-overflow"),
        ("past_dynamic", "use-after-poison"),
        ("past_copy", "heap-buffer-overflow"),
        ("past_static", "index 32 out of bounds for type 'float [32]'"),
    ],
)
def test_sanitizers_see_accesses_out_of_bounds(sanitized, fault, report):
    done = subprocess.run([sanitized, fault], capture_output=True, text=True)
    if report is None:
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    else:
        assert done.returncode != 0 and report in done.stderr
        assert re.search(r"(planted|pipeline)\.cu:\d", done.stderr)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("source", ["good.cu", "pipeline.cu", "planted.cu", "tensor.cu"])
def test_nvcc_compiles_the_same_files(tmp_path, source):
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-I", CSRC]
    for arch in ("80", "90a", "120"):
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    subprocess.run(["nvcc", *flags, "-c", HERE / source, "-o", tmp_path / "kernels.o"], check=True)


@pytest.mark.skipif(not HAS_SIMT, reason="the emulator module was not built: there is no CUDA toolkit")
def test_the_module_that_the_op_tests_use_watches_for_races():
    from pyseq import _simt

    assert _simt.watches_races()
