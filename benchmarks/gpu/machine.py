"""Is there a GPU, and what its build needs: looked at before anything is built, so pyseq is not imported here.

    python -m benchmarks.gpu.machine      prints CMAKE_CUDA_ARCHITECTURES for the card, or one sentence and status 1
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

OLDEST_TORCH = (2, 10)
EMULATOR = "emulator"
NO_GPU = "`make gpu-dry-run` runs every step that needs none"


def slug(device_name: str) -> str:
    """The name of a card's folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def architecture(capability: tuple[int, int]) -> str:
    """CMAKE_CUDA_ARCHITECTURES for one card alone; Hopper's own instructions need the `a`."""
    major, minor = capability
    return f"{major}{minor}a-real" if major == 9 else f"{major}{minor}-real"


def problem() -> str | None:
    """Why nothing can be built or run here, in one sentence."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name one that has with PYTHON=..."
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        return f"torch {torch.__version__} of {sys.executable} is too old: 2.10 is the first with the stable ABI"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} sees no GPU; {NO_GPU}"
    needed = {
        "nvcc": "the CUDA compiler; its folder, say /usr/local/cuda/bin, may be missing from PATH",
        "cmake": "3.25 or later",
        "ninja": "its Debian package is ninja-build",
        os.environ.get("CXX", "c++"): "a C++20 compiler",
    }
    missing = [f"{tool} ({what})" for tool, what in needed.items() if shutil.which(tool) is None]
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        missing.append(f"Python.h (the headers of {sys.executable}; Debian: python3-dev)")
    return f"missing to build with: {', '.join(missing)}" if missing else None


def commit() -> str:
    """The commit that is measured, with "+" where files differ from it; "unknown" outside a git checkout."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        name = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return name.stdout.strip() or "unknown"


def properties() -> dict[str, Any]:
    """What the driver says about the card, and the versions of what ran on it."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if not torch.cuda.is_available():
        return {"name": EMULATOR, **found}
    p = torch.cuda.get_device_properties(0)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, timeout=30,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = "unknown"
    return {
        "name": p.name, "devices": torch.cuda.device_count(), "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count, "memory GiB": round(p.total_memory / 2**30, 1),
        "L2 MiB": round(p.L2_cache_size / 2**20, 1), "driver": driver, "cuda": torch.version.cuda, **found,
    }


def main() -> int:
    why = problem()
    if why is not None:
        print(f"make gpu: {why}", file=sys.stderr)
        return 1
    import torch

    print(architecture(torch.cuda.get_device_capability(0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
