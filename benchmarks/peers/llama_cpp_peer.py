"""llama.cpp (MIT) from llama-cpp-python 0.3.36 (MIT), compiled for this machine; gguf_file.py writes its files.

Timed, whole model: `llama_decode` of the C API through ctypes, with default model and context options, for a prompt
(logits of the last token) or for one token of each sequence, until its logits are ready. No tokenizer, no sampling.
Timed, bare ops: a ggml graph of one node, `ssm_scan` (softplus of dt inside; no bias, D skip or gate) of Mamba or of
Mamba-2, `ssm_conv` (no bias, no SiLU), `rwkv_wkv7` or `gated_delta_net`, into memory that is allocated once. ggml has
no backward for any.

    Model(path).logits(tokens), .prefill(tokens), .decode(batch)
    ssm_scan_forward(x), ssd_forward(x), ssm_conv_forward(x), delta_rule_forward(x), gated_delta_rule_forward(x)
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import require
from .inputs import Conv, Delta, GatedDelta, Scan, Ssd


class Model:
    """A GGUF file in llama.cpp. Close it (or leave the `with` block) before the next one is loaded."""

    def __init__(self, path: Path, sequences: int = 8, threads: int = 2) -> None:
        self.lib: Any = require("llama_cpp", "llama-cpp-python").llama_cpp
        lib = self.lib
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)  # kept: ctypes does not hold it
        lib.llama_log_set(self._quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx = 4096 * sequences
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context for {path}")
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self._batches: list[Any] = []

    def close(self) -> None:
        for batch in self._batches:
            self.lib.llama_batch_free(batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [T, vocabulary] of every token of one prompt [T] of at most 512."""
        self.lib.llama_memory_clear(self.memory, True)
        self._decode(self._batch(tokens.view(1, -1), every=True))
        return torch.stack([self._row(i) for i in range(tokens.numel())])

    def prefill(self, tokens: Tensor) -> Callable[[], Tensor]:
        """One prompt [T] of at most 512 into an empty memory; logits [vocabulary] of the last token."""
        batch = self._batch(tokens.view(1, -1))

        def call() -> Tensor:
            self.lib.llama_memory_clear(self.memory, False)
            self._decode(batch)
            return self._row(tokens.numel() - 1, copy=False)

        return call

    def decode(self, sequences: int) -> Callable[[], Tensor]:
        """One token for each of the sequences, which follow a prompt of 8; logits [vocabulary] of the last one.

        The same token every time; positions advance. The callables of one Model share its memory: use one at a time.
        """
        prompt = torch.arange(sequences * 8).view(sequences, 8) % self.vocabulary
        self.lib.llama_memory_clear(self.memory, True)
        self._decode(self._batch(prompt))
        batch = self._batch(prompt[:, -1:])
        position = 8

        def call() -> Tensor:
            nonlocal position
            for i in range(sequences):
                batch.pos[i] = position
            position += 1
            self._decode(batch)
            return self._row(sequences - 1, copy=False)

        return call

    def _batch(self, tokens: Tensor, every: bool = False) -> Any:
        """A batch of [sequences, T] tokens from position 0, with logits of the last token of each (or of every one)."""
        time = tokens.shape[1]
        batch = self.lib.llama_batch_init(tokens.numel(), 0, 1)
        self._batches.append(batch)
        batch.n_tokens = tokens.numel()
        for i, token in enumerate(tokens.flatten().tolist()):
            batch.token[i] = token
            batch.pos[i] = i % time
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // time
            batch.logits[i] = every or i % time == time - 1
        return batch

    def _decode(self, batch: Any) -> None:
        status = self.lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.lib.llama_synchronize(self.context)

    def _row(self, i: int, copy: bool = True) -> Tensor:
        row = _view(self.lib.llama_get_logits_ith(self.context, i), self.vocabulary)
        return row.clone() if copy else row


def ssm_scan_forward(x: Scan, threads: int = 2) -> Callable[[], Tensor]:
    """y = <C, h> without bias, D skip and gate: dt_bias is added before, outside the timed part."""
    batch, _, channels = x.u.shape
    state = x.A.shape[1]
    floats = 3 * x.u.numel() + 2 * x.B.numel() + (2 * batch + 1) * channels * state
    g = _Graph(floats, threads)
    h = g.tensor(torch.zeros(batch, channels, 1, state))
    u, dt = g.tensor(x.u.unsqueeze(-1)), g.tensor(x.dt + x.dt_bias)
    b, c = g.tensor(x.B.unsqueeze(2)), g.tensor(x.C.unsqueeze(2))
    ids = g.tensor(torch.arange(batch, dtype=torch.int32))
    node = g.base.ggml_ssm_scan(g.context, h, u, dt, g.tensor(x.A), b, c, ids, ctypes.c_int64(1))
    return g.computing(node, x.u.shape)


def ssd_forward(x: Ssd, threads: int = 2) -> Callable[[], Tensor]:
    """y = S C without bias and D skip, by the recurrence: dt_bias is added before, outside the timed part."""
    batch, _, heads, width = x.x.shape
    last = batch * heads * width * x.B.shape[3]
    g = _Graph(2 * x.x.numel() + x.dt.numel() + heads + 2 * x.B.numel() + 2 * last, threads)
    S = g.tensor(torch.zeros(batch, heads, width, x.B.shape[3]))
    data, dt, A = g.tensor(x.x), g.tensor(x.dt + x.dt_bias), g.tensor(x.A.unsqueeze(1))
    ids = g.tensor(torch.arange(batch, dtype=torch.int32))
    node = g.base.ggml_ssm_scan(g.context, S, data, dt, A, g.tensor(x.B), g.tensor(x.C), ids, ctypes.c_int64(1))
    return g.computing(node, x.x.shape)


def delta_rule_forward(x: Delta, threads: int = 2) -> Callable[[], Tensor]:
    """y of rwkv_wkv7 for one sequence; it takes the decay, whose exponential is outside the timed part."""
    heads, width = x.q.shape[2:]
    g = _Graph(8 * x.q.numel() + 2 * heads * width * width, threads)
    r, w, k, v, a, b = (g.tensor(t[0]) for t in (x.q, x.g.exp(), x.k, x.v, x.a, x.b))
    S = g.tensor(torch.zeros(1, heads * width * width))
    return g.computing(g.base.ggml_rwkv_wkv7(g.context, r, w, k, v, a, b, S), x.v.shape)


def gated_delta_rule_forward(x: GatedDelta, threads: int = 2) -> Callable[[], Tensor]:
    """y of gated_delta_net, K = V."""
    batch, _, heads, width = x.v.shape
    states = batch * heads * width * width
    g = _Graph(4 * x.v.numel() + 2 * x.g.numel() + 2 * states, threads)
    q, k, v = (g.tensor(t) for t in (x.q, x.k, x.v))
    gate, beta = (g.tensor(t.unsqueeze(-1)) for t in (x.g, x.beta))
    S = g.tensor(torch.zeros(batch, heads, width, width))
    node = g.base.ggml_gated_delta_net(g.context, q, k, v, gate, beta, S, 1)   # keeps the last state
    return g.computing(node, x.v.shape)


def ssm_conv_forward(x: Conv, threads: int = 2) -> Callable[[], Tensor]:
    """y without bias and SiLU; the input is [B, D, W - 1 + T] with zeros in front, copied so before the timed part."""
    width = x.weight.shape[1]
    padded = torch.nn.functional.pad(x.x.transpose(1, 2), (width - 1, 0))
    g = _Graph(padded.numel() + x.weight.numel() + x.x.numel(), threads)
    node = g.base.ggml_ssm_conv(g.context, g.tensor(padded), g.tensor(x.weight))
    return g.computing(node, x.x.shape)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class _Graph:
    """A ggml context with its own memory and a graph of one op; lives until the process ends."""

    F32, I32 = 0, 26  # enum ggml_type

    def __init__(self, floats: int, threads: int) -> None:
        folder = Path(require("llama_cpp", "llama-cpp-python").__path__[0]) / "lib"
        self.base: Any = ctypes.CDLL(str(folder / "libggml-base.so"))
        self.cpu: Any = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for name in (
            "init", "new_tensor", "ssm_scan", "ssm_conv", "rwkv_wkv7", "gated_delta_net", "new_graph", "get_data"
        ):
            getattr(self.base, f"ggml_{name}").restype = ctypes.c_void_p
        self.base.ggml_ssm_scan.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64]
        self.base.ggml_ssm_conv.argtypes = [ctypes.c_void_p] * 3
        self.base.ggml_rwkv_wkv7.argtypes = [ctypes.c_void_p] * 8
        self.base.ggml_gated_delta_net.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64]
        self.cpu.ggml_graph_plan.restype = _Plan
        self.cpu.ggml_cpu_init()
        self.context = ctypes.c_void_p(self.base.ggml_init(_InitParams(4 * floats + (1 << 20), None, False)))
        self.threads = threads

    def tensor(self, values: Tensor) -> ctypes.c_void_p:
        """A ggml tensor with these values; ggml names the dimensions from the innermost outwards."""
        values = values.contiguous() if values.dtype == torch.int32 else values.float().contiguous()
        shape = (ctypes.c_int64 * values.dim())(*reversed(values.shape))
        kind = self.I32 if values.dtype == torch.int32 else self.F32
        t = ctypes.c_void_p(self.base.ggml_new_tensor(self.context, kind, values.dim(), shape))
        ctypes.memmove(self.base.ggml_get_data(t), values.data_ptr(), values.nbytes)
        return t

    def computing(self, node: int, shape: torch.Size) -> Callable[[], Tensor]:
        """Runs the graph that ends in `node`; returns the first numbers of its memory as a tensor of this shape."""
        graph = ctypes.c_void_p(self.base.ggml_new_graph(self.context))
        self.base.ggml_build_forward_expand(graph, ctypes.c_void_p(node))
        plan = self.cpu.ggml_graph_plan(graph, self.threads, None)
        work = ctypes.create_string_buffer(max(1, plan.work_size))
        plan.work_data = ctypes.addressof(work)
        data = ctypes.cast(self.base.ggml_get_data(ctypes.c_void_p(node)), ctypes.POINTER(ctypes.c_float))
        y = _view(data, shape.numel()).view(shape)

        def call(keep: object = work) -> Tensor:
            status = self.cpu.ggml_graph_compute(graph, ctypes.byref(plan))
            if status != 0:
                raise RuntimeError(f"ggml_graph_compute returned {status}")
            return y

        return call


def _view(data: Any, count: int) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.ctypeslib.as_array(data, shape=(count,)))
