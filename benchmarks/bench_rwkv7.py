"""RWKV-7 0.19B with random weights against llama.cpp: prefill of 512 tokens, decoding of 1 and 8 sequences.

12 layers of width 768, vocabulary 65536; the same weights in both. Roofline: decoding reads every weight but the
embedding once per step, 141 M of 191 M, 562 MB in float32, and reads and writes each sequence's state, 2.4 MB. Prefill
is 2 x 90 M weights of the layers per token, 93 GFLOP for 512 tokens, and the recurrence, 2 x 2.9 M a token.
"""

import functools
import json
import pathlib
import tempfile

import pytest
import torch
from safetensors.torch import save_file

import pyseq
from benchmarks import probe
from benchmarks.bench_delta_rule import multiply_adds
from benchmarks.peers import gguf_file, llama_cpp_peer, rwkv7_weights

LAYERS, WIDTH, VOCABULARY, PROMPT = 12, 768, 65536, 512
LOW_RANK = 2 * sum(rwkv7_weights.RANKS.values())
PROJECTIONS = WIDTH * (12 * WIDTH + LOW_RANK)   # weights of a layer
STATE = 4 * LAYERS * WIDTH * (rwkv7_weights.HEAD + 2)
BYTES = {"float32": 4, "bfloat16": 2}
DECODE = {(1, "float32"): 1.0, (1, "bfloat16"): 1.1, (8, "float32"): 1.7, (8, "bfloat16"): 2.2}


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="pyseq-bench-")


@functools.cache
def weights():
    return rwkv7_weights.weights(LAYERS, WIDTH, VOCABULARY)


@functools.cache
def checkpoint():
    """The original names under "model.", as transformers' conversions have them."""
    path = pathlib.Path(folder().name) / "rwkv7"
    path.mkdir()
    named = {name if name == "head.weight" else f"model.{name}": t.contiguous() for name, t in weights().items()}
    save_file(named, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({
        "model_type": "rwkv7", "architectures": ["Rwkv7ForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS, "head_dim": rwkv7_weights.HEAD,
    }))
    return path


@functools.cache
def ours(dtype):
    return pyseq.from_pretrained(checkpoint(), dtype=getattr(torch, dtype)).pack()


@functools.cache
def llama_cpp(dtype):
    path = pathlib.Path(folder().name) / f"rwkv7-{dtype}.gguf"
    gguf_file.write_rwkv7(path, weights(), {"float32": "f32", "bfloat16": "bf16"}[dtype])
    return llama_cpp_peer.Model(path)


@pytest.mark.parametrize("dtype", BYTES)
def test_prefill(compare, dtype):
    ids = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def call():
        return ours(dtype)(ids, logits_to_keep=1).logits

    compare(
        f"RWKV-7 0.19B {dtype}, prefill {PROMPT}",
        {"pyseq": lambda: call, "llama.cpp": lambda: llama_cpp(dtype).prefill(ids[0])}, targets={"llama.cpp": 2},
        tokens=PROMPT, bytes=BYTES[dtype] * LAYERS * PROJECTIONS, rounds=5,
        flops=2 * PROMPT * LAYERS * (PROJECTIONS + multiply_adds(1, 1, WIDTH // 64, 64, False)),
    )


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("batch", [1, 8])
def test_decode(compare, batch, dtype):
    prompt = torch.arange(batch * 8).view(batch, 8)

    def stepping():
        with torch.inference_mode():
            step = ours(dtype).stepper(ours(dtype)(prompt).state)

        @torch.inference_mode()
        def call():
            return step(prompt[:, -1])

        return call

    compare(
        f"RWKV-7 0.19B {dtype}, decode batch {batch}",
        {"pyseq": stepping, "llama.cpp": lambda: llama_cpp(dtype).decode(batch)},
        targets={"llama.cpp": DECODE[batch, dtype]}, tokens=batch,
        bytes=BYTES[dtype] * (LAYERS * PROJECTIONS + WIDTH * VOCABULARY) + 2 * batch * STATE,
        beside=probe.read_bandwidth, rounds=9,
    )
