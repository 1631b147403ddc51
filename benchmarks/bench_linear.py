"""linear against torch's F.linear and the packed path of oneDNN inside torch; decoding beside a bandwidth probe.

Roofline: at one row the weight is read once, out x in x 4 bytes (2 for bfloat16), at memory bandwidth, which a probe
measures just before and after each sample; a weight under the size of the last cache comes faster. Many rows are bound
by multiplications: 2 rows x in x out flop; the bound shown is that of float32, bfloat16 products are twice as fast.
"""

import pytest
import torch
from torch.nn import functional as F

import pyseq
from benchmarks import probe

FEATURES = {"in_proj": (768, 3072), "out_proj": (1536, 768), "lm_head": (768, 50280)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def onednn(weight, rows):
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def packed(weight, rows):
    ready = pyseq.pack_linear(weight)
    return lambda x: pyseq.linear(x, ready)


WHO = {
    "pyseq packed": packed,
    "pyseq": lambda weight, rows: lambda x: pyseq.linear(x, weight),
    "torch": lambda weight, rows: lambda x: F.linear(x, weight),
    "onednn packed": onednn,
}


@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("name", FEATURES)
@DTYPES
def test_forward(compare, dtype, name, rows):
    inputs, outputs = FEATURES[name]
    weight, x = torch.randn(outputs, inputs, dtype=dtype), torch.randn(rows, inputs, dtype=dtype)

    def case(make):
        call = make(weight, rows)

        @torch.inference_mode()
        def run():
            return call(x)

        return lambda: run

    few = rows <= 16
    compare(
        f"linear {name}, {rows} rows, {str(dtype)[6:]}", {who: case(make) for who, make in WHO.items()}, rounds=5,
        bytes=weight.nbytes, flops=0.0 if few else 2 * rows * weight.numel(),
        beside=probe.read_bandwidth if few and name == "lm_head" else None,
    )


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
@DTYPES
def test_forward_and_backward(compare, dtype, name):
    inputs, outputs = FEATURES[name]
    weight = torch.randn(outputs, inputs, dtype=dtype, requires_grad=True)
    x = torch.randn(2048, inputs, dtype=dtype, requires_grad=True)
    dy = torch.randn(2048, outputs, dtype=dtype)

    def case(make):
        call = make(weight, 2048)
        return lambda: lambda: torch.autograd.grad(call(x), (x, weight), dy)

    compare(f"linear {name}, 2048 rows, forward+backward, {str(dtype)[6:]}",
            {who: case(WHO[who]) for who in ("pyseq", "torch")}, rounds=5, bytes=weight.nbytes,
            flops=6 * 2048 * weight.numel())
