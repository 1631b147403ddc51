"""linear against torch's F.linear and the packed path of oneDNN inside torch; decoding beside a bandwidth probe.

Roofline: at one row the weight is read once, out x in x 4 bytes (2 for bfloat16), at memory bandwidth, which the probe
(a sum over 256 MiB) measures in the same run; a weight under the size of the last cache comes faster. Many rows are
bound by multiplications: 2 rows x in x out flop at 32 (AVX-512 at half rate) or 64 flop per cycle and core in float32,
twice that in bfloat16.
"""

import pytest
import torch
from torch.nn import functional as F

import pyseq

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
@pytest.mark.parametrize("who", WHO)
def test_forward(timed, who, dtype, name, rows):
    inputs, outputs = FEATURES[name]
    weight = torch.randn(outputs, inputs, dtype=dtype)
    x = torch.randn(rows, inputs, dtype=dtype)
    with torch.no_grad():
        call = WHO[who](weight, rows)
        timed(lambda: call(x), work=f"linear {name}, {rows} rows, {dtype}", who=who,
              bytes=weight.nbytes, flops=2 * rows * weight.numel())


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
@DTYPES
@pytest.mark.parametrize("who", ["pyseq", "torch"])
def test_forward_and_backward(timed, who, dtype, name):
    inputs, outputs = FEATURES[name]
    weight = torch.randn(outputs, inputs, dtype=dtype, requires_grad=True)
    x = torch.randn(2048, inputs, dtype=dtype, requires_grad=True)
    dy = torch.randn(2048, outputs, dtype=dtype)
    call = WHO[who](weight, 2048)
    timed(lambda: call(x).backward(dy), work=f"linear {name}, 2048 rows, forward + backward, {dtype}", who=who,
          bytes=weight.nbytes, flops=6 * 2048 * weight.numel())


def test_bandwidth_probe(timed):
    memory = torch.ones(64 << 20)
    timed(memory.sum, work="bandwidth probe", who="torch sum", bytes=memory.nbytes)
