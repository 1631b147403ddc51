"""Saving and loading our own layout, and files that lie or are cut short."""

import json
import os
import resource
import struct
import subprocess
import sys

import huggingface_hub
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyseq
from pyseq.models import CausalLM, Config, pretrained

IDS = torch.arange(24).reshape(2, 12) % 61


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-6])
def test_round_trip(tiny, dtype, tie, eps, tmp_path):
    model = tiny(dtype=dtype, tie_embeddings=tie, layer_args={"mixer_rms_eps": eps}, eos_token_id=[1, 2])
    model.save_pretrained(tmp_path)
    assert listing(tmp_path) == ["config.json", "model.safetensors"]
    read = pyseq.from_pretrained(tmp_path)
    assert read.config == model.config and not read.training
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    for (name, p), (_, q) in zip(read.named_parameters(), model.named_parameters(), strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q) and p.requires_grad, name
        assert getattr(p, "_no_weight_decay", False) == getattr(q, "_no_weight_decay", False)


def test_training_continues_after_loading(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    model = pyseq.from_pretrained(tmp_path)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_file_may_change_after_loading(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    model = pyseq.from_pretrained(tmp_path)
    expected = model(IDS).logits
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    assert torch.equal(model(IDS).logits, expected)


def test_byte_tokenizer_goes_with_a_byte_vocabulary(tiny, tmp_path):
    tiny(vocab_size=256).save_pretrained(tmp_path / "bytes")
    tiny().save_pretrained(tmp_path / "other")
    assert pyseq.from_pretrained(tmp_path / "bytes").tokenizer.encode("é") == [0xC3, 0xA9]
    assert pyseq.from_pretrained(tmp_path / "other").tokenizer is None


def test_hub_id(tiny, tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    asked = []

    def download(name, allow_patterns, ignore_patterns=()):
        asked.append((name, *ignore_patterns))
        assert not any(pattern.endswith((".bin", ".pt")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pyseq.from_pretrained("someone/some-model_1.0")
    assert asked == [("someone/some-model_1.0", "consolidated*")]  # the same weights twice, where both are there
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pyseq convert"):
        pyseq.from_pretrained("someone/a-pickle")
    assert asked[1:] == [("someone/a-pickle", "consolidated*"), ("someone/a-pickle",)]
    for path in ("nowhere", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="path"):
            pyseq.from_pretrained(path)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Crash()])
@pytest.mark.parametrize("where", ["weights", "config"])
def test_interrupted_save_leaves_the_old_checkpoint(tiny, where, error, tmp_path, monkeypatch):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_written(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    def full(*_, **__):
        raise error

    monkeypatch.setattr(pretrained, "save_file", half_written) if where == "weights" else None
    monkeypatch.setattr(pretrained.json, "dumps", full) if where == "config" else None
    with pytest.raises(type(error)):
        tiny(n_layer=3).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_full_disk(tiny, tmp_path):
    """A real one, as far as a test can: the system refuses to let the file grow."""
    model = tiny()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = """
import resource, signal, sys
import pyseq
model = pyseq.from_pretrained(sys.argv[1])
model.backbone.embeddings.weight.data.zero_()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    model.save_pretrained(sys.argv[1])
except Exception as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and done.stdout.startswith("refused:"), done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_while_saving(tiny, tmp_path):
    """Whatever the moment, another process reads one whole model, and so it does after the writer was killed."""
    tiny().save_pretrained(tmp_path)
    code = """
import itertools, sys, pyseq
model = pyseq.from_pretrained(sys.argv[1])
for value in itertools.count():
    for p in model.parameters():
        p.data.fill_(value)
    model.save_pretrained(sys.argv[1])
    print(flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    for attempt in range(21):
        if attempt == 20:
            process.kill()
            process.wait()
            process.stdout.close()
        values = torch.cat([p.detach().flatten() for p in pyseq.from_pretrained(tmp_path).parameters()])
        assert (values == values[0]).all()


def header(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "nothing": b"",
    "short": b"\x10\x00",
    "header longer than the file": header({}, length=1 << 20),
    "header of 2^63 bytes": header({}, length=1 << 63),
    "no JSON": header(b"hello"),
    "not text": header(b"\xff\xfe\x00{"),
    "a list": header(b"[]"),
    "no tensors": header({}),
    "past the end": header({"a": entry(0, 1 << 40, [1 << 38])}, b"0000"),
    "overlap": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"0" * 12),
    "hole": header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"0" * 12),
    "end before start": header({"a": entry(4, 0, [1])}, b"0000"),
    "shape and length differ": header({"a": entry(0, 4, [1 << 40])}, b"0000"),
    "shape overflows": header({"a": entry(0, 4, [1 << 32, 1 << 32, 1 << 32])}, b"0000"),
    "negative shape": header({"a": entry(0, 4, [-1])}, b"0000"),
    "unknown type": header({"a": entry(0, 4, [1], "Q32")}, b"0000"),
    "bytes left over": header({"a": entry(0, 4, [1])}, b"0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header(tiny, lie, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(ValueError, match=r"safetensors|checkpoint"):
        pyseq.from_pretrained(tmp_path)
    assert listing(tmp_path) == ["config.json", "model.safetensors"]


@hypothesis.settings(deadline=None, max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.data())
def test_damaged_file_is_an_error_or_another_number(tiny, tmp_path, data):
    """Any one change: ValueError, unless it fell on a weight."""
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        damaged = True
    else:
        at = data.draw(st.integers(0, start - 1) | st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        damaged = False
    try:
        pyseq.from_pretrained(tmp_path)
    except ValueError:
        pass
    else:
        assert not damaged


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


D = "backbone.layers.1.mixer.D"
EDITS = {
    "missing": lambda t: t.pop(D),
    "unexpected": lambda t: t.update(extra=torch.zeros(1)),
    "shape": lambda t: t.update({D: torch.zeros(65)}),
    "float": lambda t: t.update({D: torch.zeros(64, dtype=torch.int32)}),
    "numbered": lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name],
    "dimensions": lambda t: t.update({"backbone.embeddings.weight": torch.zeros(64)}),
    "F64": lambda t: t.update({D: torch.zeros(64, dtype=torch.complex64)}),
}


@pytest.mark.parametrize("word", EDITS)
def test_wrong_tensors(tiny, word, tmp_path):
    tiny().save_pretrained(tmp_path)
    change(tmp_path, EDITS[word])
    with pytest.raises(ValueError, match="F32|" + word if word == "float" else word):
        pyseq.from_pretrained(tmp_path)


def sharded(folder, tensors, weight_map=None):
    names = sorted(tensors)
    half = len(names) // 2
    for i, part in enumerate((names[:half], names[half:])):
        save_file({name: tensors[name].clone() for name in part}, folder / f"part{i}.safetensors")
    weight_map = weight_map or {name: f"part{int(i >= half)}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_index(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    sharded(tmp_path, model.state_dict())
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert torch.equal(pyseq.from_pretrained(path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../part0.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/part0.safetensors"},
        {"a": "..\\part0.safetensors"},
        {"a": "part0.bin"},
        {"a": "absent.safetensors"},
        {"a": 3},
        {"a": ["part0.safetensors"]},
        {"a": "part0.safetensors"},
        [],
        {},
        "part0.safetensors",
    ],
)
def test_lying_index(tiny, weight_map, tmp_path):
    model = tiny()
    folder = tmp_path / "inner"
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "part0.safetensors")
    sharded(folder, model.state_dict())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index|missing|checkpoint|tensors"):
        pyseq.from_pretrained(folder)


def test_tensor_in_two_shards(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    sharded(tmp_path, model.state_dict())
    (tmp_path / "model.safetensors").rename(tmp_path / "part0.safetensors")
    with pytest.raises(ValueError, match="also in"):
        pyseq.from_pretrained(tmp_path / "model.safetensors.index.json")


BROKEN = ["", "{", "[]", "3", "[" * 100_000, '{"pyseq": 3}', '{"pyseq": {"d_model": 32}}', "\xff"]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_config(tiny, text, tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config"):
        pyseq.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pyseq.from_pretrained(tmp_path)


values = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([32, 61, 10**9, 10**30])
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(-1, 3), max_size=2)
    | st.dictionaries(st.sampled_from(["d_state", "d_inner", "x", "dt_rank"]), st.integers(-1, 10**12), max_size=2)
)
fields = [*Config.__dataclass_fields__, "unknown"]


@hypothesis.settings(deadline=None, max_examples=80, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(st.dictionaries(st.sampled_from(fields), values, max_size=2))
def test_absurd_values_in_our_config(tiny, tmp_path, changes):
    """Loads, or says ValueError; never a crash, never the memory of a claimed size."""
    tiny().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["pyseq"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (1 << 20)
    try:
        pyseq.from_pretrained(tmp_path)(IDS)
    except ValueError as error:
        assert "config" in str(error) or "checkpoint" in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


def test_wrong_dtype_argument(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype"):
        pyseq.from_pretrained(tmp_path, dtype=torch.int8)


def test_config_names_what_is_wrong():
    for changes in ({"d_model": 0}, {"n_layer": True}, {"vocab_size": 1.5}, {"layer": "LSTM"}, {"norm_eps": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Config(**{"d_model": 32, "n_layer": 2, "vocab_size": 61, **changes})
    with pytest.raises(ValueError, match="layer_args"):
        CausalLM(Config(d_model=32, n_layer=1, vocab_size=8, layer_args={"heads": 3}))
