"""130 M models with random weights: prefill of 512 tokens, decoding of 1 and 8 sequences, and one step of one layer.

The same weights in every peer. Roofline: decoding reads every weight once per step, 516 MB in float32 (the head is the
embedding), and reads and writes each sequence's state, 2.4 MB of mamba-130m, 18.9 MB of mamba2-130m; a bandwidth probe
stands beside every figure, because a virtual machine's memory can be twice as fast a minute later. A bfloat16 state
halves what 8 sequences of mamba2-130m move besides the weights. Prefill is 2 x 91 M weights of the layers per token
(2 x 90 M of mamba2-130m), 93 GFLOP for 512 tokens, and the scan, 2 x 11 M a token of mamba2-130m.
"""

import functools
import pathlib
import tempfile
from dataclasses import dataclass

import pytest
import torch
from torch.utils._pytree import tree_map

import pyseq
from benchmarks import probe
from benchmarks.bench_ssd import multiply_adds
from benchmarks.peers import gguf_file, llama_cpp_peer, require, transformers_peer

PROMPT = 512


@dataclass(frozen=True)
class Model:
    layer: type[torch.nn.Module]
    weights: dict[str, float]                  # bytes, by dtype
    state: float                               # bytes of a sequence, float32
    projections: int                           # weights of those of a layer
    flops: float                               # of a layer and token, the scan of Mamba left out
    prefill: dict[str, dict[str, float]]       # targets, by dtype
    decode: dict[tuple[int, str], float]       # of llama.cpp, by batch and dtype


MAMBA, MAMBA2 = 768 * 3072 + 1536 * 80 + 48 * 1536 + 1536 * 768, 768 * 3352 + 1536 * 768
BOTH = {"llama.cpp": 3, "transformers": 5}
MODELS = {
    "mamba-130m": Model(
        pyseq.Mamba, {"float32": 516.5e6, "bfloat16": 260.0e6}, 2.36e6, MAMBA, 2 * MAMBA,
        {"float32": {"llama.cpp": 4}}, {(1, "float32"): 1.1, (8, "float32"): 3},
    ),
    "mamba2-130m": Model(
        pyseq.Mamba2, {"float32": 516.0e6, "bfloat16": 258.5e6}, 18.87e6, MAMBA2,
        2 * (MAMBA2 + multiply_adds(1, 1, 24, 64, 128, 1, False)), {"float32": BOTH, "bfloat16": BOTH},
        {(1, "float32"): 1.0, (1, "bfloat16"): 1.1, (8, "float32"): 1.7, (8, "bfloat16"): 1.7},
    ),
}
DTYPES = ("float32", "bfloat16")


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="pyseq-bench-")


@functools.cache
def weights(name):
    return transformers_peer.model(name).state_dict()


@functools.cache
def checkpoint(name):
    """A transformers checkpoint of the weights, which pyseq loads as a user would."""
    path = pathlib.Path(folder().name) / name
    transformers_peer.model(name, weights(name)).save_pretrained(path)
    return path


@functools.cache
def ours(name, dtype):
    return pyseq.from_pretrained(checkpoint(name), dtype=getattr(torch, dtype)).pack()


@functools.cache
def transformers_model(name, dtype):
    return transformers_peer.model(name, weights(name), getattr(torch, dtype))


@functools.cache
def llama_cpp(name, dtype):
    path = pathlib.Path(folder().name) / f"{name}-{dtype}.gguf"
    gguf_file.write(path, weights(name), {"float32": "f32", "bfloat16": "bf16"}[dtype])
    return llama_cpp_peer.Model(path)


@pytest.fixture(autouse=True)
def needs_transformers():
    require("transformers", "transformers")   # it draws the weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_prefill(compare, name, dtype):
    model, ids = MODELS[name], torch.randint(50280, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def call():
        return ours(name, dtype)(ids, logits_to_keep=1).logits

    compare(
        f"{name} {dtype}, prefill {PROMPT}",
        {"pyseq": lambda: call,
         "llama.cpp": lambda: llama_cpp(name, dtype).prefill(ids[0]),
         "transformers": lambda: transformers_peer.prefill(transformers_model(name, dtype), ids)},
        targets=model.prefill.get(dtype),
        tokens=PROMPT, flops=PROMPT * 24 * model.flops, bytes=model.weights[dtype], rounds=5,
    )


def stepping(name, batch, dtype, narrow=False):
    """One token for each of `batch` sequences, which follow a prompt of 8; the states float32, or narrow."""
    model = ours(name, dtype)
    prompt = torch.arange(batch * 8).view(batch, 8)
    with torch.inference_mode():
        state = model(prompt).state
        step = model.stepper(tree_map(torch.Tensor.bfloat16, state) if narrow else state)

    @torch.inference_mode()
    def call():
        return step(prompt[:, -1])

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_decode(compare, name, batch, dtype):
    model = MODELS[name]
    cases = {
        "pyseq": lambda: stepping(name, batch, dtype),
        "llama.cpp": lambda: llama_cpp(name, dtype).decode(batch),
        "transformers": lambda: transformers_peer.decode(transformers_model(name, dtype), batch),
    }
    if name == "mamba2-130m":
        cases["pyseq, bfloat16 state"] = lambda: stepping(name, batch, dtype, narrow=True)
    goal = model.decode.get((batch, dtype))
    compare(
        f"{name} {dtype}, decode batch {batch}", cases, targets={"llama.cpp": goal} if goal else None, tokens=batch,
        bytes=model.weights[dtype] + 2 * batch * model.state, beside=probe.read_bandwidth, rounds=9,
    )


@pytest.mark.parametrize("name", MODELS)
def test_layer_step(compare, name):
    layer, x = MODELS[name].layer(768).eval(), torch.randn(1, 768)
    state = layer.init_state(1)

    @torch.inference_mode()
    def call():
        return layer.step(x, state)

    packed = MODELS[name].layer(768).eval()
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
        f"one {MODELS[name].layer.__name__} layer of {name}, step, batch 1",
        {"pyseq, packed": lambda: call_packed, "pyseq": lambda: call,
         "transformers": lambda: transformers_peer.mixer_step(name)},
        targets={"transformers": 5} if name == "mamba-130m" else None, bytes=4 * MODELS[name].projections, rounds=15,
    )
