"""mma and ldmatrix: every element in its place, and the faults that they report."""

import pytest
import torch
from emulated import fails, in_every_order, needs_toolkit, run

pytestmark = needs_toolkit
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "int8": torch.int8}
by_type = pytest.mark.parametrize("kind", TYPES)


def depth(kind):
    return 32 // TYPES[kind].itemsize


def product(lib, kind, a, b, c=None, swapped=0):
    wide = torch.int32 if kind == "int8" else torch.float32
    a, b = a.to(TYPES[kind]), b.to(TYPES[kind])
    c = torch.zeros(16, 8, dtype=wide) if c is None else c.to(wide)
    return in_every_order(lib, f"mma_{kind}", lambda: (a, b, c, torch.full((16, 8), -77, dtype=wide), swapped), 3)


def integers(*shape, seed, most):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed))


@by_type
def test_mma_of_integers_is_exact(lib, kind):
    k, most = depth(kind), 127 if kind == "int8" else 60
    a, b, c = integers(16, k, seed=0, most=most), integers(k, 8, seed=1, most=most), integers(16, 8, seed=2, most=9999)
    assert torch.equal(product(lib, kind, a, b, c).long(), a @ b + c)


@by_type
def test_mma_takes_each_element_from_its_place(plain, kind):
    """One factor picks a row or column of the other, all of whose elements differ."""
    k = depth(kind)
    a, b = torch.arange(16 * k).view(16, k) % 256, torch.arange(k * 8).view(k, 8) % 256
    if kind == "int8":
        a, b = a - 128, b - 128
    for first in range(0, k, 8):
        pick = torch.zeros(k, 8, dtype=torch.long)
        pick[first : first + 8] = torch.eye(8, dtype=torch.long)
        assert torch.equal(product(plain, kind, a, pick).long(), a[:, first : first + 8])
        pick = torch.zeros(16, k, dtype=torch.long)
        pick[:8, first : first + 8] = pick[8:, first : first + 8] = torch.eye(8, dtype=torch.long)
        assert torch.equal(product(plain, kind, pick, b).long(), b[first : first + 8].repeat(2, 1))


@by_type
def test_wrong_fragment_map_shows(lib, kind):
    a, b = integers(16, depth(kind), seed=3, most=50), integers(depth(kind), 8, seed=4, most=50)
    assert not torch.equal(product(lib, kind, a, b, swapped=1).long(), a @ b)


def test_tf32_rounds_its_inputs(lib):
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-10 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 3.14159265, 1e-30, 1e30])
    want = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1.0, 3.140625, 0, 0])
    d = product(lib, "tf32", torch.eye(8).repeat(2, 1), x.expand(8, 8))
    assert torch.equal(d[0, :6], want[:6]) and torch.equal(d, d[:1].expand(16, 8))
    torch.testing.assert_close(d[0, 6:], x[6:], rtol=2**-11, atol=0)


def test_int8_sums_wrap(lib):
    a, b = torch.full((16, 32), 127), torch.full((32, 8), 127)
    c = torch.full((16, 8), 2**31 - 1)
    want = (c + a @ b + 2**31) % 2**32 - 2**31
    assert torch.equal(product(lib, "int8", a, b, c).long(), want)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("stride", [8, 24, 40])
def test_ldmatrix(lib, n, transposed, stride):
    x = torch.randperm(64 * n, generator=torch.Generator().manual_seed(n)).to(torch.int16)
    make = lambda: (x, torch.full((32, n), -1, dtype=torch.int32), stride, 0, transposed)  # noqa: E731
    r = in_every_order(lib, f"ldmatrix_{n}", make, 1)
    matrices = x.view(n, 8, 8).mT if transposed else x.view(n, 8, 8)
    pairs = matrices.reshape(n, 32, 2).int()
    assert torch.equal(r, (pairs[..., 0] | pairs[..., 1] << 16).T)


def test_ldmatrix_checks_its_rows(lib):
    out = torch.zeros(32, 1, dtype=torch.int32)
    x = torch.zeros(64, dtype=torch.int16)
    for stride, shift in ((8, 4), (12, 0)):
        for message in fails(lib, "ldmatrix_1", x, out, stride, shift, 0):
            assert "in ldmatrix(mask 0xffffffff) at tensor.cu:" in message
            assert message.endswith(": a row that is not aligned to 16 bytes")


@pytest.mark.parametrize("transposed", [0, 1])
def test_tile_product(lib, transposed):
    x, w = integers(16, 16, seed=5, most=60), integers(8, 16, seed=6, most=60)
    xb, wb = x.bfloat16(), (w.T if transposed else w).contiguous().bfloat16()
    y = in_every_order(lib, "tile_product", lambda: (xb, wb, torch.full((16, 8), torch.nan), transposed), 2)
    assert torch.equal(y.long(), x @ w.T)


def test_mma_without_the_whole_warp_shows(lib):
    for message in fails(lib, "half_mma", torch.zeros(16)):
        assert message.startswith("half_mma_kernel, block (0, 0, 0): thread ")
        assert "in mma(mask 0xffffffff) at tensor.cu:" in message and "lanes of the warp have exited" in message


def test_noise_moves_the_sums_of_mma_a_little(plain):
    gen = torch.Generator().manual_seed(7)
    a, b = torch.randn(16, 16, generator=gen).bfloat16(), torch.randn(16, 8, generator=gen).bfloat16()
    exact = a.double() @ b.double()
    plain.set_noise(5)
    try:
        noisy = product(plain, "bf16", a, b)
    finally:
        plain.set_noise(0)
    off = (noisy.double() - exact).abs() / (a.double().abs() @ b.double().abs())
    assert 2**-25 < off.max() < 2**-22.5
    assert run(plain, (0, 0), "half_mma", torch.zeros(16)) != 0
