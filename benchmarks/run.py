"""`make bench`: runs every benchmark, keeps the figures, and writes the page that shows them.

    python -m benchmarks.run               run, then write benchmarks/results/<machine>.json and docs/performance.md
    python -m benchmarks.run --report      write the page again from the results that are there
    python -m benchmarks.run -k scan       only some; the figures of the others are kept
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import probe, report

RESULTS = Path(__file__).parent / "results"


def cpu() -> dict[str, str]:
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def machine_name() -> str:
    f = cpu()
    text = f"{f.get('model name', platform.machine())}-family{f.get('cpu family', '')}-model{f.get('model', '')}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main() -> int:
    arguments = sys.argv[1:]
    path = RESULTS / f"{machine_name()}.json"
    if "--report" not in arguments:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "benchmark.json"
            command = [sys.executable, "-m", "pytest", "benchmarks", "-q", f"--benchmark-json={output}", *arguments]
            status = subprocess.run(command, cwd=Path(__file__).parent.parent).returncode
            if status:
                return status
            measured = [b["extra_info"] for b in json.loads(output.read_text())["benchmarks"]]
        before = json.loads(path.read_text())["works"] if path.exists() else []
        again = {w["work"] for w in measured}
        torch.set_num_threads(2)
        result = {
            "cpu": {k: cpu().get(k, "") for k in ("model name", "cpu family", "model", "flags")},
            "cores": os.cpu_count(),
            "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "probe": probe.probe(),
            "works": [w for w in before if w["work"] not in again] + measured,
        }
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    report.write(RESULTS, Path(__file__).parent.parent / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
