"""A run that was stopped, killed or out of disk goes on to the bits of a run that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyseq.train import Result, Settings, Watcher, checkpoint, resume, train

RUN = """
import json, resource, sys, torch
from pathlib import Path
from pyseq.train import Settings, Watcher, resume, train
torch.set_num_threads(1)
class Slow(Watcher):
    def step(self, record):
        print(record["step"], flush=True)
settings, out, limit = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
result = train(Settings.from_json(settings), out, Slow()) if settings else resume(out, Slow())
sys.exit(0 if result.stopped_by is None else 128 + result.stopped_by)
"""


def start(out: Path, settings: Settings | None = None, file_limit: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own; without settings, resumed."""
    given = json.dumps(settings.to_json() if settings else {})
    return subprocess.Popen(
        [sys.executable, "-c", RUN, given, str(out), str(file_limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= step:
            return
    raise AssertionError(process.communicate())


def same(one: Result, other: Result) -> None:
    """Bit for bit: parameters, optimizer, carried state, settings, random state, and the log but for its speeds."""
    assert one.step == other.step and one.held_out == other.held_out
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors, others = load_file(one.checkpoint / name), load_file(other.checkpoint / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert timeless(one.log) == timeless(other.log)
    facts, others = (checkpoint.facts(result.checkpoint) for result in (one, other))
    assert {**facts, "log_bytes": 0} == {**others, "log_bytes": 0}


def timeless(log: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


class StopAt(Watcher):
    def __init__(self, step: int) -> None:
        self.last = step

    def step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.last:
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"carry_state": False},
        {"accumulate": 3},
        {"bf16": True},
        {"time_limit": 2.0, "steps": None},
        {"layer": "Mamba2", "headdim": 4},
        {"layer": "Mamba2", "headdim": 4, "bf16": True},
    ],
    ids=["carried", "not_carried", "accumulated", "bf16", "time_limit", "mamba2", "mamba2_bf16"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, tiny: Settings, changes: dict[str, Any]) -> None:
    settings = dataclasses.replace(tiny, **changes)
    if settings.time_limit:
        settings = dataclasses.replace(settings, save_every=1)
    with pytest.raises(RuntimeError, match="stopped"):
        train(settings, tmp_path / "stopped", StopAt(4 if settings.time_limit else 13))
    resumed = resume(tmp_path / "stopped")
    assert resumed.complete
    if settings.time_limit:  # how many steps fit is measured, so the run to compare with is told
        settings = dataclasses.replace(settings, time_limit=None, steps=resumed.steps)
        whole = train(settings, tmp_path / "whole")
        assert timeless(resumed.log) == timeless(whole.log)
    else:
        same(resumed, train(settings, tmp_path / "whole"))


def test_a_killed_run_goes_on(tmp_path: Path, tiny: Settings) -> None:
    settings = dataclasses.replace(tiny, steps=60, save_every=3, evaluate_every=30)
    process = start(tmp_path / "killed", settings)
    wait_for_step(process, 20)
    process.kill()
    process.communicate()
    last = checkpoint.checkpoints(tmp_path / "killed")[-1]
    assert 15 <= checkpoint.facts(last)["step"] < 60
    same(resume(tmp_path / "killed"), train(settings, tmp_path / "whole"))
    assert not list((tmp_path / "killed").glob(".partial*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, tiny: Settings, number: signal.Signals) -> None:
    settings = dataclasses.replace(tiny, steps=400, save_every=400, evaluate_every=400)
    process = start(tmp_path / "stopped", settings)
    wait_for_step(process, 7)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + number
    (only,) = checkpoint.checkpoints(tmp_path / "stopped")
    assert 7 <= checkpoint.facts(only)["step"] < 400
    same(resume(tmp_path / "stopped"), train(settings, tmp_path / "whole"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, tiny: Settings) -> None:
    """No file may grow past 60 KB: the model fits, the optimizer's moments do not."""
    settings = dataclasses.replace(tiny, d_model=16, save_every=5)
    stopped = tmp_path / "stopped"
    with pytest.raises(RuntimeError, match="stopped"):
        train(settings, stopped, StopAt(7))
    before = {path: path.read_bytes() for path in stopped.rglob("step-*/*")}
    sizes = {path.name: len(content) for path, content in before.items()}
    limit = 60_000
    assert sizes["model.safetensors"] < limit < sizes["optimizer.safetensors"]
    process = start(stopped, file_limit=limit)
    errors = process.communicate()[1]
    assert process.returncode == 1 and "cannot write the checkpoint of step 10" in errors
    assert {path: path.read_bytes() for path in stopped.rglob("step-*/*")} == before
    assert not list(stopped.glob(".partial*"))
    same(resume(stopped), train(settings, tmp_path / "whole"))


def test_an_interrupted_write_leaves_nothing_half_written(
    tmp_path: Path, tiny: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(dataclasses.replace(tiny, steps=10), tmp_path / "run")
    before = sorted(path for path in (tmp_path / "run").rglob("*"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for step, broken in enumerate(("fsync", "rename"), 11):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, broken, full)
            model = torch.nn.Linear(2, 2)
            model.save_pretrained = lambda path: (path / "config.json").write_text("{}")  # type: ignore[assignment]
            checkpoint.save(tmp_path / "run", step, model, torch.optim.SGD(model.parameters()), None, {})
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path, tiny: Settings) -> None:
    out = tmp_path / "run"
    result = train(dataclasses.replace(tiny, save_every=4), out)
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step-00000016", "step-00000020"]
    assert (out / "latest").resolve() == result.checkpoint.resolve()


def test_a_complete_run_is_left_as_it_is(tmp_path: Path, tiny: Settings) -> None:
    first = train(tiny, tmp_path / "run")
    log = first.log.read_bytes()
    began = time.monotonic()
    again = resume(tmp_path / "run")
    assert time.monotonic() - began < 5
    assert again.step == first.step and again.held_out == first.held_out and first.log.read_bytes() == log


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, tiny: Settings) -> None:
    train(dataclasses.replace(tiny, steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny, tmp_path / "run")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        resume(tmp_path / "nothing")


def test_a_run_of_before_there_was_a_choice_of_layers_goes_on(tmp_path: Path, tiny: Settings) -> None:
    last = train(tiny, tmp_path / "run", StopAt(99)).checkpoint
    facts = json.loads((last / "trainer.json").read_text())
    for name in ("layer", "headdim"):
        del facts["settings"][name]
    (last / "trainer.json").write_text(json.dumps(facts))
    assert resume(tmp_path / "run").complete


@pytest.mark.parametrize("damage", ["settings", "json", "optimizer", "moment"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, tiny: Settings, damage: str) -> None:
    last = train(dataclasses.replace(tiny, steps=2), tmp_path / "run").checkpoint
    facts = json.loads((last / "trainer.json").read_text())
    if damage == "settings":
        facts["settings"]["surprise"] = 1
        (last / "trainer.json").write_text(json.dumps(facts))
    elif damage == "json":
        (last / "trainer.json").write_text('{"settings": ')
    elif damage == "optimizer":
        (last / "optimizer.safetensors").write_bytes(b"\xff" * 100)
    else:
        from safetensors.torch import save_file

        tensors = load_file(last / "optimizer.safetensors")
        tensors["exp_avg.backbone.norm_f.weight"] = torch.zeros(3)
        save_file(tensors, last / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"settings|trainer\.json|not a checkpoint|optimizer\.safetensors"):
        resume(tmp_path / "run")
