"""Generation with its step recorded once and replayed, by a stand-in for CUDA graphs that runs on a CPU."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.models import generation, replay
from pyseq.models.replay import WARM, WORTH, Replay, graphs_for

IDS = torch.arange(14).reshape(2, 7) * 5 % 61
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")  # results on the host


def tensors(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Every operation of a function with the very tensors it read and made, as a graph has their addresses."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._overloadpacket.__name__ not in READS, func
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False)
            if isinstance(a, torch.Tensor) and s.alias_info is not None and s.alias_info.is_write
        ]  # fmt: skip
        for t in written:
            self.before.setdefault(id(t), (t, t.clone()))
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        fresh = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in inputs]
        self.calls.append((func, args, kwargs, fresh))
        return out

    def replay(self):
        for func, args, kwargs, fresh in self.calls:
            out = func(*args, **kwargs)
            kept = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in kept]
            for t, new in zip(fresh, made, strict=True):
                t.copy_(new)
                if t.numel():
                    new.zero_()   # nobody but the tape may hold it


class Stand:
    """Records like a CUDA graph: the function runs nothing that counts, and replaying runs none of its Python."""

    def __init__(self, *_):
        self.log = []

    def warm(self, function):
        self.log.append("warm")
        function()

    def record(self, function):
        self.log.append("record")
        tape = Tape()
        with tape:
            function()
        for t, before in reversed(tape.before.values()):
            t.copy_(before)
        return lambda: (self.log.append("replay"), tape.replay())


@pytest.fixture
def stand(monkeypatch):
    made = Stand()
    monkeypatch.setattr(generation, "graphs_for", lambda device: made)
    return made


def test_the_third_call_records_and_later_ones_replay():
    stand, counter = Stand(), torch.zeros(())
    add = Replay(lambda: counter.add_(1), stand, WARM + WORTH)
    for n in range(1, 6):
        add()
        assert counter.item() == n
    assert stand.log == ["warm"] * WARM + ["record"] + ["replay"] * 3
    for eager in (Replay(lambda: counter.add_(1), None, 99), Replay(lambda: counter.add_(1), stand, WARM + WORTH - 1)):
        for _ in range(WARM + 1):
            eager()
    assert counter.item() == 5 + 2 * (WARM + 1) and len(stand.log) == WARM + 4


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as a capture needs it, on no GPU."""
    made = SimpleNamespace(streams=[], captures=[], emptied=0)

    class Graph:
        def capture_begin(self, pool=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local"
            made.captures.append(self)
            self.shared, self.ended = pool, False

        def capture_end(self):
            self.ended = True

        def pool(self):
            return self.shared or (id(self), 0)

        def replay(self):
            assert self.ended

    def stream(device):
        made.streams.append(device)
        return f"stream {len(made.streams)}"

    def empty():
        made.emptied += 1

    replaced = {"Stream": stream, "CUDAGraph": Graph, "empty_cache": empty}
    for name, value in (replaced | {"stream": lambda s: nullcontext(), "device": lambda d: nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(replay, "_MADE", replay._Made())
    return made


def test_graphs_share_one_stream_and_one_pool_per_thread_and_device(cuda):
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert graphs_for(torch.device("cpu")) is None
    for device in (first, second, first, second):
        graphs_for(device).record(lambda: None)()
    other = threading.Thread(target=lambda: graphs_for(first).record(lambda: None))
    other.start()
    other.join()
    assert cuda.streams == [first, second, first]
    a, b, again_a, again_b, elsewhere = cuda.captures
    assert again_a.shared == a.pool() and again_b.shared == b.pool() != a.pool()
    assert a.shared is b.shared is elsewhere.shared is None and cuda.emptied == 0


def test_a_capture_that_finds_no_memory_is_made_again_after_emptying_the_cache(cuda):
    graphs = replay.CudaGraphs(torch.device("cuda:0"))
    fails = [torch.OutOfMemoryError(), ValueError("another")]

    def function():
        if fails:
            raise fails.pop(0)

    with pytest.raises(ValueError, match="another"):
        graphs.record(function)
    assert cuda.emptied == 1 and all(graph.ended for graph in cuda.captures) and graphs.last is None
    graphs.record(function)()
    assert graphs.last is cuda.captures[2]


OPTIONS = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 3},
    "top_k": {"seed": 3, "top_k": 7, "temperature": 0.7},
    "penalty": {"seed": 3, "repetition_penalty": 1.3},
    "greedy_penalty": {"temperature": 0, "repetition_penalty": 1.3},
    "end": {"temperature": 0, "eos_token_id": [3, 59, 17]},
    "end_seeded": {"seed": 1, "eos_token_id": list(range(0, 61, 4))},
    "stop": {"seed": 5, "stop": [[k] for k in range(0, 61, 6)]},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_tokens_and_states_as_without(either, monkeypatch, options, padded):
    model = either(pad_token_id=60)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    options = options | {"return_state": True} | ({"attention_mask": mask} if padded else {})
    ids, state = model.generate(IDS, 40, **options)
    made = Stand()
    monkeypatch.setattr(generation, "graphs_for", lambda device: made)
    again, after = model.generate(IDS, 40, **options)
    assert torch.equal(ids, again)
    for a, b in zip(tree_leaves(state), tree_leaves(after), strict=True):
        assert torch.equal(a, b)
    assert made.log.count("record") <= 1 and ("replay" in made.log or ids.shape[1] <= 7 + WARM + 1)


def test_a_graph_looks_seldom_unless_asked(tiny, stand, monkeypatch):
    looks = []
    look = generation.Decoding.all_done
    monkeypatch.setattr(generation.Decoding, "all_done", lambda run: (looks.append(run.end - run.start), look(run))[1])
    tiny().generate(IDS, 40, seed=0)
    assert looks == [16, 32, 40]
    looks.clear()
    got = []
    ids = tiny().generate(IDS, 5, seed=0, stream=got.append)
    assert looks == [1, 2, 3, 4, 5] and torch.equal(torch.stack(got, 1), ids[:, 7:])


def test_rows_that_end_unseen_are_cut_where_the_last_one_ended(tiny, stand):
    model = tiny(pad_token_id=60)
    free = model.generate(IDS, 12, temperature=0)
    stop = free[0, 9].item()
    at = free[0, 7:].tolist().index(stop) + 7
    ids = model.generate(IDS[:1], 40, temperature=0, eos_token_id=stop)
    assert torch.equal(ids, free[:1, : at + 1])


def test_nan_is_an_error_later_but_an_error(tiny, stand):
    model = tiny()
    with torch.no_grad():
        model.backbone.norm_f.weight.fill_(float("nan"))
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="finite"):
            model.generate(IDS, 20, temperature=temperature)


def test_a_longer_run_starts_like_a_shorter_one(tiny):
    model = tiny()
    long = model.generate(IDS, 150, seed=4)
    for n in (1, 63, 64, 65, 129):
        assert torch.equal(model.generate(IDS, n, seed=4), long[:, : 7 + n])


def test_a_prompt_in_chunks_is_the_prompt(tiny, monkeypatch):
    model = tiny()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    for options in ({}, {"attention_mask": mask}):
        monkeypatch.setattr(generation, "_CHUNK", 4096)
        ids, state = model.generate(IDS, 9, seed=2, return_state=True, **options)
        monkeypatch.setattr(generation, "_CHUNK", 3)
        again, after = model.generate(IDS, 9, seed=2, return_state=True, **options)
        assert torch.equal(ids, again)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(after), strict=True))


LAYERS = {
    "mamba": {},
    "falcon": {"layer_args": {"mixer_rms_eps": 1e-6}},
    "mamba2": {"layer": "Mamba2", "layer_args": {"headdim": 8, "ngroups": 2}},
}


@pytest.mark.parametrize("backend", [b for b in testing.backends(REGISTRY["mamba_step"]) if b == "simt"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_step_on_the_emulator_is_the_step(tiny, options, backend):
    model = tiny(**options)
    with torch.inference_mode():
        states = [model(IDS).state for _ in range(3)]
        for t in range(3):
            want = model.stepper(states[0])(IDS[:, t])
            with testing.on(backend):
                got = model.stepper(states[1])(IDS[:, t])
                stepped, states[2] = model.step(IDS[:, t], states[2])
            testing.assert_close(got, want.double(), "logits", "gradient")   # as many roundings as a gradient's
            assert torch.equal(stepped, got)
    for a, b in zip(tree_leaves(states[0]), tree_leaves(states[1]), strict=True):
        testing.assert_close(b, a.double(), "state", "gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cuda_graph_gives_the_same_tokens(either, monkeypatch, options, device):
    model, ids = either(pad_token_id=60).to(device), IDS.to(device)
    graphed, state = model.generate(ids, 40, return_state=True, **options)
    monkeypatch.setattr(generation, "graphs_for", lambda device: None)
    plain, after = model.generate(ids, 40, return_state=True, **options)
    assert torch.equal(graphed, plain)
    for a, b in zip(tree_leaves(state), tree_leaves(after), strict=True):
        assert torch.equal(a, b)
