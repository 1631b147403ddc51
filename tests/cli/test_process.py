"""The commands as a user starts them: in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PYSEQ = [sys.executable, "-c", "from pyseq.cli import main; main()"]


def test_demo_trains_writes_and_is_safe_to_repeat(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"{i * j}: the state of the scan\n" for j in range(40)))
    command = [*PYSEQ, "demo", str(tmp_path / "text"), "--out", str(tmp_path / "demo"), "--time-limit", "2s"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "xz -9e" in first.stdout and " writes, at " in first.stdout and "pyseq generate" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is trained already" in again.stdout
    assert again.stdout.split(" writes, at ")[1] == first.stdout.split(" writes, at ")[1]
    endless = " ".join(f"'{part}'" for part in [*PYSEQ, "generate", str(tmp_path / "demo"), "-n", "1000000"])
    shown = subprocess.run(f"{endless} -p x | head -c 5", shell=True, capture_output=True, timeout=120)
    assert len(shown.stdout) == 5 and shown.stderr == b""


def test_ctrl_c_stops_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(900)))
    command = [*PYSEQ, "train", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--steps", "100000"]
    sizes = ["--d-model", "8", "--layers", "1", "--batch", "1", "--length", "16", "--evaluate-every", "100000"]
    process = subprocess.Popen([*command, *sizes], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size > 5000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    assert len(list((tmp_path / "run").glob("step-*"))) == 1
