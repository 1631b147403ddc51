"""The commands, through typer's runner: exit codes, what goes to which stream, and JSON that a program can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from pyseq import testing
from pyseq._library import REGISTRY
from pyseq.cli import app
from pyseq.cli.doctor import instruction_set, notes
from pyseq.cli.output import seconds
from pyseq.cli.train import merged
from pyseq.cli.workloads import WORKLOADS
from pyseq.models import CausalLM, Config, from_pretrained
from pyseq.train import PRESETS

TINY = ["--d-model", "8", "--layers", "1", "--d-state", "4", "--batch", "2", "--length", "16", "--held-out", "200"]
TINY7 = [*TINY[:4], *TINY[6:]]  # the size of RWKV-7's state is that of its heads


def call(*arguments: object, code: int = 0, text: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"line {i}: the state of the scan\n" for i in range(60)))
    call("train", folder / "text.txt", "--steps", 6, "--out", folder / "run", *TINY)
    return folder / "run"


@pytest.mark.parametrize("command", ["doctor", "demo", "train", "generate", "convert", "bench", "verify"])
def test_every_command_explains_itself(command: str) -> None:
    assert command in call("--help").stdout
    assert "--help" in call(command, "--help").stdout


def test_train_prints_results_and_resumes(run: Path) -> None:
    report = json.loads(call("train", "--resume", run, "--json").stdout)
    assert report["complete"] and report["step"] == report["steps"] == 6
    assert Path(report["checkpoint"]).name == "step-00000006" and Path(report["curve"]).is_file()
    assert 0 < report["held_out_bits_per_byte"] < 8.5 and report["gzip_bits_per_byte"] < 8
    shown = call("train", "--resume", run)
    assert "bits per byte" in shown.stdout and "gzip -9" in shown.stdout and "training" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.txt", "--steps", 3], 1, "neither a file nor a folder"),
        (["--steps", 3, "--device", "tpu"], 1, "device 'tpu': expected cpu, cuda or cuda:<number>"),
        (["--learning-rate", -1], 1, "learning_rate = -1.0"),
        (["--preset", "huge"], 2, "expected one of demo, small, medium"),
        (["--layer", "lstm"], 2, "expected mamba or mamba2"),
        (["--headdim", 4, "--steps", 3], 1, "Mamba has no heads"),
        (["--layer", "rwkv7", "--d-state", 4, "--steps", 3], 1, "the size of its heads, headdim"),
        (["--layer", "rwkv7", "--d-model", 40, "--steps", 3], 1, "head_size must divide d_model = 40, got 64"),
        (["--layer", "mamba2", "--d-model", 40, "--steps", 3], 1, "headdim must divide d_ssm = 80, got 64"),
        (["--time-limit", "soon"], 2, "expected a time"),
        (["--resume", "nowhere"], 1, "holds no checkpoint"),
        (["--resume", "nowhere", "--steps", 3], 2, "leave out steps"),
        (["--steps", 3, "--time-limit", "3s"], 1, "exactly one"),
    ],
)
def test_train_names_what_is_wrong(tmp_path: Path, arguments: list[Any], code: int, message: str) -> None:
    out = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    assert message in " ".join(call("train", *arguments, *out, code=code).stderr.replace("│", " ").split())


def test_mamba2_from_text_to_text(run: Path, tmp_path: Path) -> None:
    text, out = run.parent / "text.txt", tmp_path / "run"
    call("train", text, "--layer", "mamba2", "--headdim", 4, "--steps", 6, "--out", out, *TINY)
    assert from_pretrained(out / "latest").config.layer == "Mamba2"
    assert json.loads(call("train", "--resume", out, "--json").stdout)["complete"]
    assert json.loads(call("generate", out, "-n", 5, "--seed", 1, "--json").stdout)["tokens"] <= 5
    call("convert", out / "latest", tmp_path / "copy")
    assert from_pretrained(tmp_path / "copy").config.layer == "Mamba2"


def test_rwkv7_from_text_to_text(run: Path, tmp_path: Path) -> None:
    text, out = run.parent / "text.txt", tmp_path / "run"
    call("train", text, "--layer", "rwkv7", "--headdim", 4, "--steps", 6, "--out", out, *TINY7)
    model = from_pretrained(out / "latest")
    assert model.config.layer == "RWKV7" and not model.config.tie_embeddings
    assert model.config.layer_args == {"head_size": 4}
    assert json.loads(call("train", "--resume", out, "--json").stdout)["complete"]
    assert json.loads(call("generate", out, "-n", 5, "--seed", 1, "--json").stdout)["tokens"] <= 5
    call("train", text, "--start-from", out / "latest", "--steps", 3, "--out", tmp_path / "more", "--headdim", 4)
    call("convert", out / "latest", tmp_path / "copy")
    assert from_pretrained(tmp_path / "copy").config == model.config


def test_a_model_without_a_tokenizer_asks_for_one(tmp_path: Path) -> None:
    CausalLM(Config(8, 1, 4, "RWKV7", {"head_size": 4}, eos_token_id=0)).save_pretrained(tmp_path)
    message = call("generate", tmp_path, "-p", "ab", code=1).stderr
    assert "--tokenizer FILE" in " ".join(message.split())
    (tmp_path / "v.txt").write_text("1 'a' 1\n2 'b' 1\n3 'ab' 2\n")
    report = json.loads(
        call("generate", tmp_path, "-p", "ab", "-n", 3, "--tokenizer", tmp_path / "v.txt", "--json").stdout
    )
    assert set(report["text"]) <= {"a", "b"}


def test_train_does_not_overwrite_a_run(run: Path) -> None:
    assert "already holds a run" in " ".join(call("train", "--steps", 3, "--out", run, code=1).stderr.split())


def test_a_number_of_steps_replaces_a_time_and_the_other_way_round() -> None:
    with_steps = merged(PRESETS["demo"], {"steps": 3})
    assert with_steps["steps"] == 3 and "time_limit" not in with_steps
    assert merged(PRESETS["demo"], {"time_limit": "3m"})["time_limit"] == 180


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("2m", 120), ("1.5h", 5400)])
def test_times(text: str, value: float) -> None:
    assert seconds(text) == value


def test_generate_writes_the_same_for_a_seed(run: Path) -> None:
    first = call("generate", run, "--prompt", "line ", "-n", 20, "--seed", 3).stdout
    assert first.startswith("line ") and len(first) > 10
    assert call("generate", run / "latest", "--prompt", "-", "-n", 20, "--seed", 3, text="line ").stdout == first
    report = json.loads(call("generate", run, "-p", "line ", "-n", 20, "--seed", 3, "--json").stdout)
    assert report["prompt"] + report["text"] + "\n" == first and report["tokens"] <= 20


def test_generate_starts_a_document_without_a_prompt(run: Path) -> None:
    report = json.loads(call("generate", run, "-n", 5, "--temperature", 0, "--json").stdout)
    assert report["prompt"] == "" and report["tokens"] <= 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", -1], 1, "temperature must be"),
        (["--top-p", 2], 1, "top_p must be"),
        (["--dtype", "int8"], 2, "expected float32 or bfloat16"),
    ],
)
def test_generate_names_what_is_wrong(run: Path, arguments: list[Any], code: int, message: str) -> None:
    assert message in " ".join(call("generate", run, "-n", 3, *arguments, code=code).stderr.split())


def test_generate_without_a_checkpoint(tmp_path: Path) -> None:
    assert "error:" in call("generate", tmp_path / "nothing", code=1).stderr


def test_convert_rewrites_a_pickle(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    model = CausalLM(Config(d_model=8, n_layer=1, vocab_size=16, layer_args={"d_state": 4}))
    model.save_pretrained(source)
    torch.save(dict(model.state_dict()), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    report = json.loads(call("convert", source, target, "--json").stdout)
    assert report["bytes"] > 0 and (target / "model.safetensors").is_file()
    assert "error:" in call("convert", tmp_path / "nothing", tmp_path / "other", code=1).stderr


def test_doctor_tells_what_is_built() -> None:
    found = json.loads(call("doctor", "--json").stdout)
    assert found["kernels"].keys() == REGISTRY.keys()
    assert found["torch"] == torch.__version__ and str(torch.get_num_threads()) in found["threads"]
    shown = call("doctor").stdout
    assert all(op in shown for op in REGISTRY) and "instruction set" in shown


def test_doctor_says_what_is_slow_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("1 thread of 8 cores" in note for note in notes(1, 8))
    assert any("share 2 cores" in note for note in notes(8, 2))
    monkeypatch.setattr("pyseq._C.cpu_level", 2)
    monkeypatch.setattr("pyseq._C.cpu_level_of_machine", 4)
    assert any("PYSEQ_CPU forces v2" in note for note in notes(2, 2))
    assert "forced by PYSEQ_CPU" in instruction_set(2, 4)
    monkeypatch.setattr("pyseq._C.cpu_level_of_machine", 2)
    assert any("4 floats at a time" in note for note in notes(2, 2))


def test_verify_passes_and_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(call("verify", "mamba_step", "--json").stdout)
    assert report["passed"] and all(0 < row["step"] <= 1 and row["forward"] is None for row in report["errors"])
    report = json.loads(call("verify", "rms_norm_gated", "--json").stdout)
    assert report["passed"] and len(report["errors"]) >= len(testing.DTYPES)
    assert all(0 < row["forward"] <= 1 and 0 < row["gradients"] <= 1 for row in report["errors"])
    op = REGISTRY["rms_norm_gated"]
    right = op.function
    monkeypatch.setattr(op, "function", lambda x, *rest, **options: right(x * 1.01, *rest, **options))
    shown = call("verify", "rms_norm_gated", code=1).stdout
    assert "Beyond it" in shown
    assert "expected some of" in call("verify", "no_such_op", code=2).stderr


@pytest.mark.parametrize("command", [("train", "--steps", 1), ("generate", "anything"), ("bench",)])
def test_a_gpu_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]) -> None:
    monkeypatch.setattr("pyseq._cuda.absence", lambda: "torch sees no GPU")
    failed = call(*command, "--device", "cuda", code=1)
    assert failed.stderr.strip() == "error: device 'cuda': torch sees no GPU"


def test_bench_has_work_for_every_op() -> None:
    assert WORKLOADS.keys() == REGISTRY.keys()


def test_bench_times_an_op() -> None:
    report = json.loads(call("bench", "rms_norm_gated", "--seconds", 0.01, "--json").stdout)
    assert report["read_gb_per_s"] > 0 and {row["work"] for row in report["timings"]} == {
        "forward",
        "forward + backward",
    }
    assert all(0 < row["best"] <= row["median"] and row["gb_per_s"] > 0 for row in report["timings"])
    assert "GB/s" in call("bench", "rms_norm_gated", "--seconds", 0.01).stdout


def test_a_broken_checkpoint_is_a_sentence_not_a_traceback(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = call("generate", tmp_path, code=1)
    assert result.stderr.startswith("error:") and "Traceback" not in result.output
