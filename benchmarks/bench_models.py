"""mamba-130m with random weights: prefill of 512 tokens, decoding of 1 and 8 sequences, and one step of one layer.

The same weights in every peer. Roofline: decoding reads every weight once per step, 516 MB in float32 (the head is the
embedding), and each sequence's state twice, 2.4 MB; a bandwidth probe stands beside every figure, because a virtual
machine's memory can be twice as fast a minute later. Prefill is 2 x 91 M weights of the layers per token, 93 GFLOP for
512 tokens, and the scan.
"""

import functools
import pathlib
import tempfile

import pytest
import torch

import pyseq
from benchmarks import probe
from benchmarks.peers import gguf_file, llama_cpp_peer, require, transformers_peer

PROMPT = 512
TARGETS = {"prefill": {"llama.cpp": 4}, 1: {"llama.cpp": 1.1}, 8: {"llama.cpp": 3}}
WEIGHTS = {"float32": 516.5e6, "bfloat16": 260.0e6}
STATE = 2.36e6
LAYER_FLOPS = 2 * 24 * (768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768)


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="pyseq-bench-")


@functools.cache
def weights():
    return transformers_peer.model("mamba-130m").state_dict()


@functools.cache
def checkpoint():
    """A transformers checkpoint of the weights, which pyseq loads as a user would."""
    path = pathlib.Path(folder().name) / "hf"
    transformers_peer.model("mamba-130m", weights()).save_pretrained(path)
    return path


@functools.cache
def ours(dtype):
    return pyseq.from_pretrained(checkpoint(), dtype=getattr(torch, dtype)).pack()


@functools.cache
def transformers_model(dtype):
    return transformers_peer.model("mamba-130m", weights(), getattr(torch, dtype))


@functools.cache
def llama_cpp(dtype):
    path = pathlib.Path(folder().name) / f"{dtype}.gguf"
    gguf_file.write(path, weights(), {"float32": "f32", "bfloat16": "bf16"}[dtype])
    return llama_cpp_peer.Model(path)


@pytest.fixture(autouse=True)
def needs_transformers():
    require("transformers", "transformers")   # it draws the weights


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_prefill(compare, dtype):
    ids = torch.randint(50280, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def call():
        return ours(dtype)(ids, logits_to_keep=1).logits

    compare(
        f"mamba-130m {dtype}, prefill {PROMPT}",
        {"pyseq": lambda: call,
         "llama.cpp": lambda: llama_cpp(dtype).prefill(ids[0]),
         "transformers": lambda: transformers_peer.prefill(transformers_model(dtype), ids)},
        targets=TARGETS["prefill"] if dtype == "float32" else None,
        tokens=PROMPT, flops=PROMPT * LAYER_FLOPS, bytes=WEIGHTS[dtype], rounds=5,
    )


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("batch", [1, 8])
def test_decode(compare, batch, dtype):
    model = ours(dtype)
    prompt = torch.arange(batch * 8).view(batch, 8)
    with torch.inference_mode():
        step = model.stepper(model(prompt).state)

    @torch.inference_mode()
    def call():
        return step(prompt[:, -1])

    compare(
        f"mamba-130m {dtype}, decode batch {batch}",
        {"pyseq": lambda: call,
         "llama.cpp": lambda: llama_cpp(dtype).decode(batch),
         "transformers": lambda: transformers_peer.decode(transformers_model(dtype), batch)},
        targets=TARGETS[batch] if dtype == "float32" else None,
        tokens=batch, bytes=WEIGHTS[dtype] + 2 * batch * STATE, beside=probe.read_bandwidth, rounds=9,
    )


def test_layer_step(compare):
    layer = pyseq.Mamba(768).eval()
    state, x = layer.init_state(1), torch.randn(1, 768)

    @torch.inference_mode()
    def call():
        return layer.step(x, state)

    packed = pyseq.Mamba(768).eval()
    packed.load_state_dict(layer.state_dict())
    for module in packed.modules():
        if hasattr(module, "pack"):
            module.pack()
    with torch.inference_mode():
        stepper = packed.stepper(packed.init_state(1))

    @torch.inference_mode()
    def call_packed():
        return stepper(x)

    compare(
        "one Mamba layer of mamba-130m, step, batch 1",
        {"pyseq, packed": lambda: call_packed, "pyseq": lambda: call,
         "transformers": lambda: transformers_peer.mixer_step("mamba-130m")},
        targets={"transformers": 5}, bytes=4 * (768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768), rounds=15,
    )
