"""What this card can do: the limits that the bounds of the timing tables are computed from, measured beside them."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

from . import machine
from .device import Device
from .record import NotHere

SOURCE = Path(__file__).with_name("rooflines.cu")


def compile_kernels(architecture: str, folder: Path) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise NotHere("nvcc is not on PATH")
    library = folder / "rooflines.so"
    command = [nvcc, "-O3", "-use_fast_math", "-shared", "-Xcompiler", "-fPIC", "-Werror", "all-warnings"]
    subprocess.run([*command, f"-arch=sm_{architecture}", "-o", str(library), str(SOURCE)], check=True, timeout=120)
    return library


def kernels(device: Device) -> dict[str, float]:
    """ex2 and bf16 mma.sync operations, and bytes read from L2, per second. In a dry run they are compiled only."""
    with tempfile.TemporaryDirectory() as folder:
        if device.dry:
            compile_kernels("80", Path(folder))
            return {}
        architecture = machine.architecture(torch.cuda.get_device_capability(0)).removesuffix("-real")
        library = ctypes.CDLL(str(compile_kernels(architecture, Path(folder))))
    blocks = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    scratch = torch.empty(blocks * 256, device=device.device)
    buffer = torch.zeros(device.l2_bytes() // 8, device=device.device)   # half of L2
    found = {}
    for name, more in (("ex2", ()), ("mma", ()), ("l2_bytes", (ctypes.c_void_p(buffer.data_ptr()), buffer.nbytes))):
        measure = getattr(library, f"{name}_per_second")
        measure.restype = ctypes.c_double
        found[name] = measure(ctypes.c_void_p(scratch.data_ptr()), blocks, *more)
        if not found[name] > 0:
            raise RuntimeError(f"{name}: CUDA error in the microkernel")
    return {"ex2/s": found["ex2"], "mma.sync bf16 FLOP/s": found["mma"], "L2 read B/s": found["l2_bytes"]}


def copy(device: Device) -> dict[str, float]:
    """Bytes per second of a large copy, read and written counted both."""
    x = torch.empty(1 << (16 if device.dry else 30), dtype=torch.uint8, device=device.device)
    y = torch.empty_like(x)
    seconds = statistics.median(device.time([lambda: y.copy_(x)], 20, warm_up=3))
    return {"copy B/s": 2 * x.numel() / seconds}


def matmul(device: Device) -> dict[str, float]:
    """Operations per second of a large bf16 product through torch, on random data: zeros run faster."""
    n = 128 if device.dry else 8192
    x, w = (torch.randn(n, n, device=device.device).to(torch.bfloat16) for _ in range(2))
    seconds = statistics.median(device.time([lambda: x @ w], 10, warm_up=3))
    return {"bf16 product FLOP/s": 2 * n**3 / seconds}
