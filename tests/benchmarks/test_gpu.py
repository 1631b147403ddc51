"""`make gpu` where there is no GPU: its records, its draws, its report, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import bench, check, device, fuzz, machine, profile, runtime, works
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.record import NotHere, Record
from pyseq._library import REGISTRY

ROOT = Path(__file__).parent.parent.parent


class Cpu(device.Dry):
    """The same bodies on the CPU's kernels, which every op has."""

    def __init__(self) -> None:
        self.backend = "cpu"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_results_files_say() -> None:
    assert (ROOT / "docs" / "performance.md").read_text() == report.page(ROOT / "benchmarks" / "results")


def test_a_gpu_without_a_results_file_is_not_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "nvidia-h200").mkdir()
    assert "## GPU" not in report.page(tmp_path)
    committed = [card.name for card in gpu_report.cards(ROOT / "benchmarks" / "results")]
    assert (ROOT / "docs" / "performance.md").read_text().count("## GPU") == len(committed)


def timing(seconds: float) -> dict[str, float]:
    return {"median": seconds, "minimum": seconds, "samples": 5}


def test_the_card_s_section_tells_times_goals_ratios_and_failures(tmp_path: Path) -> None:
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    work = {"ok": True, "timings": {"pyseq": timing(0.3e-3)}, "goal": 0.35e-3, "bound": 0.25e-3, "bound by": "ex2"}
    peers = {
        "ok": True, "timings": {"pyseq": timing(0.31e-3), "mamba-ssm": timing(0.93e-3)}, "ratios": {"mamba-ssm": 3.0},
        "targets": {"mamba-ssm": 2.0}, "failed": {"fla": "RuntimeError: a | b\nmore", "torch": "missing: no torch"},
    }
    content = {
        "part": "bench", "card": "NVIDIA H200", "date": "2027-01-02", "commit": "abc", "finished": False,
        "properties": {"name": "NVIDIA H200", "cuda": "13.0"}, "limits": {"copy B/s": 4.3e12},
        "items": {"scan": work, "scan, peers": peers, "conv": {"ok": False, "why": "RuntimeError: broken"}},
    }
    (folder / "bench.json").write_text(json.dumps(content))
    text = gpu_report.section(folder)
    assert "| scan | 300.0 us (goal 350.0 us, met) |" in text and "| 250.0 us (ex2) | 83 % |" in text
    assert "mamba-ssm 930.0 us: **3x** (goal 2x, met)<br>fla: RuntimeError: a / b |" in text and "no torch" not in text
    assert "failed: conv: RuntimeError: broken" in text and "did not run to its end" in text


# ---- records ---------------------------------------------------------------------------------------------------------


def raise_(error: Exception) -> dict[str, Any]:
    raise error


def test_a_record_is_on_disk_after_every_item_and_its_status_tells(tmp_path: Path) -> None:
    record = Record("check", tmp_path, 60)
    record.item("fine", lambda: {"summary": "1 thing"})
    assert json.loads(record.path.read_text())["items"]["fine"]["ok"] is True
    record.item("absent", lambda: raise_(NotHere("no tool")))
    assert record.finish() == 0
    record.item("wrong", lambda: raise_(ValueError("off by one")))
    record.item("slow", lambda: time.sleep(10) or {}, limit=0.2)
    record.item("judged", lambda: {"ok": False, "why": "too large"})
    assert record.finish() == 1
    items = json.loads(record.path.read_text())["items"]
    assert items["absent"] == {"ok": None, "why": "no tool", "seconds": items["absent"]["seconds"]}
    assert "off by one" in items["wrong"]["traceback"] and items["slow"]["why"] == "not done after 0 s"
    assert [name for name, item in items.items() if item["ok"] is False] == ["wrong", "slow", "judged"]


def test_what_the_time_does_not_reach_has_not_passed(tmp_path: Path) -> None:
    record = Record("check", tmp_path, 1)
    assert "not reached" in record.item("late", dict)["why"] and record.finish() == 1


def test_an_item_that_dies_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    found = check.in_process("no such item", True, 30)
    assert found["ok"] is False and "status 2" in found["why"]


# ---- what runs on the card, on the CPU's kernels ---------------------------------------------------------------------


def test_random_draws_match_float64() -> None:
    found = fuzz.run(Cpu(), 60, 40, fuzz.LONGEST)
    assert found["ok"] and found["draws"] == 40, found


def test_a_wrong_kernel_is_found_by_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    op = REGISTRY["rms_norm_gated"]
    right = op.function
    monkeypatch.setattr(op, "function", lambda **given: right(**given, **({} if "z" in given else {"z": given["x"]})))
    monkeypatch.setattr(fuzz, "ops", lambda _: [op])
    found = fuzz.run(Cpu(), 60, 12, 16)
    assert not found["ok"] and "times what rounding explains" in found["why"]


@pytest.mark.parametrize("body", [runtime.graphs, runtime.streams, runtime.big_offsets, runtime.smallest])
def test_graphs_streams_and_offsets(body: Any) -> None:
    body(Cpu())


def test_every_op_with_a_kernel_is_drawn_and_timed() -> None:
    own = {name for name, op in REGISTRY.items() if not op.cublas}
    assert own == set(fuzz.DRAWS) == {work.op for work in works.standard()} == {work.op for work in works.tiny()}


@pytest.mark.parametrize("work", works.tiny(), ids=lambda work: work.name)
def test_a_work_is_validated_timed_and_bounded(work: works.Work) -> None:
    everybody = {bench.OURS: work.ours, "wrong": lambda x: lambda: [t * 2 for t in device.tensors(work.ours(x)())]}
    found = bench.measure(Cpu(), work, {"copy B/s": 1e9, "ex2/s": 1e12}, everybody)
    assert found["ok"] is None and "differs from float64" in found["failed"]["wrong"]
    found = bench.measure(Cpu(), work, {"copy B/s": 1e9, "ex2/s": 1e12}, {bench.OURS: work.ours, "twin": work.ours})
    assert found["ratios"]["twin"] > 0 and found["bound by"] == "memory" and found["bound"] == work.bytes / 1e9


def test_the_gpu_s_clock_graphs_and_streams_use_what_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = mock.MagicMock(spec=torch.cuda)   # only names that torch.cuda has
    cuda.Event.return_value.elapsed_time.return_value = 2.0
    cuda.mem_get_info.return_value = (5, 7)
    cuda.synchronize.side_effect = [None] * 3 + [RuntimeError("an illegal memory access")]
    monkeypatch.setattr(device.torch, "cuda", cuda)
    card, calls = device.Cuda(), list[int]()
    assert card.time([lambda: calls.append(0), lambda: calls.append(1)], 4, warm_up=2) == [2e-3] * 4
    assert calls == [0, 1, 0, 0, 1, 0, 1]
    assert card.capture(lambda: 7) == (cuda.CUDAGraph.return_value.replay, 7)
    assert card.faulted() and card.free_bytes() == 5
    with card.side_stream():
        pass


def test_a_sanitizer_without_a_summary_has_not_passed() -> None:
    clean = "========= ERROR SUMMARY: 0 errors"
    assert check.sanitizer_verdict(0, clean) == (True, "")
    assert check.sanitizer_verdict(0, "========= RACECHECK SUMMARY: 0 hazards displayed")[0] is True
    assert check.sanitizer_verdict(0, "========= RACECHECK SUMMARY: 2 hazards displayed")[0] is False
    assert check.sanitizer_verdict(9, "========= ERROR SUMMARY: 10 errors")[0] is False
    assert check.sanitizer_verdict(0, "")[0] is False and check.sanitizer_verdict(1, clean)[0] is False
    assert check.sanitizer_verdict(1, "Error: Device not supported.")[0] is None


def test_a_profile_s_counters_are_read() -> None:
    text = (
        '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum","sm__inst_executed_pipe_xu.avg.pct_of_x"\n'
        '"","","us","%"\n"0","void pyseq::(anonymous namespace)::scan_kernel<4, float>(Args)","1,234.5","61.5"\n'
    )
    (kernel,) = profile.parse(text)
    assert kernel["kernel"] == "pyseq::scan_kernel" and kernel["duration"] == {"gpu__time_duration.sum [us]": 1234.5}
    assert kernel["pipes %"] == {"sm__inst_executed_pipe_xu.avg.pct_of_x [%]": 61.5}
    assert profile.parse("==ERROR== no counters") == []


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_test_files_that_cannot_be_imported_are_named(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("import os\nimport no_such_module.part\n")
    (tmp_path / "tests" / "test_b.py").write_text("from test_a import x\ndef f():\n    import no_such_module\n")
    assert check.unimportable(tmp_path / "tests") == {"tests/test_a.py": "no_such_module"}
    assert check.unimportable(ROOT / "tests") == {}


def test_a_card_is_built_for_alone() -> None:
    cards = {(8, 0): "80-real", (8, 6): "86-real", (9, 0): "90a-real", (12, 0): "120-real"}
    assert {c: machine.architecture(c) for c in cards} == cards
    assert machine.slug("NVIDIA H200") == "nvidia-h200"


def test_without_a_gpu_one_sentence_and_a_status() -> None:
    if torch.cuda.is_available():
        assert machine.problem() is None
        return
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}   # of a make that runs us
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
    sentence, *rest = ran.stderr.splitlines()
    assert ran.returncode != 0 and ran.stdout == "" and "sees no GPU" in sentence and "make gpu-dry-run" in sentence
    assert all(line.startswith("make: ***") for line in rest)
