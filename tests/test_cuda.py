"""Which card gets which kernels, and the sentences for machines where none run."""

import pytest
import torch

import pyseq
from pyseq import _C, _cuda
from pyseq.cli.doctor import gpu, notes

COMPILED = "80,90a-real,120"


@pytest.mark.parametrize(
    ("capability", "how"),
    [
        ((7, 5), None),
        ((8, 0), "machine code of sm_80"),
        ((8, 9), "machine code of sm_80"),
        ((9, 0), "machine code of sm_90a"),
        ((10, 0), "PTX of compute_80"),
        ((12, 0), "machine code of sm_120"),
        ((12, 1), "machine code of sm_120"),
        ((13, 0), "PTX of compute_120"),
    ],
)
def test_a_card_runs_machine_code_of_its_own_or_compiles_ptx(capability, how):
    found = _cuda.runs_on(capability, COMPILED)
    assert found is None if how is None else how in found


def test_code_for_one_card_does_not_run_on_the_next():
    assert _cuda.runs_on((9, 0), "90a-real") and _cuda.runs_on((10, 0), "90a-real,90a-virtual") is None
    assert _cuda.runs_on((8, 6), "90") is None and _cuda.runs_on((8, 0), None) is None


def test_what_was_compiled_is_told_in_words():
    assert _cuda.summary(COMPILED) == "kernels for sm_80, sm_90a, sm_120; PTX of compute_80, compute_120"
    assert _cuda.summary(None) == "no kernels: built without nvcc"
    assert _cuda.version(12080) == "12.8"


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "available", "compiled", "capability", "expected"),
    [
        (None, 0, False, COMPILED, None, "this torch is a CPU build"),
        ("13.0", 0, False, COMPILED, None, "finds no NVIDIA driver"),
        ("13.0", 13000, False, COMPILED, None, "sees no GPU"),
        ("13.0", 13000, True, None, (9, 0), "without CUDA kernels"),
        ("13.0", 12080, True, COMPILED, (9, 0), "the driver supports CUDA 12.8"),
        ("13.0", 13000, True, COMPILED, (7, 5), "no kernels were compiled for this card"),
        ("13.0", 13000, True, COMPILED, (9, 0), None),
    ],
)
def test_why_nothing_runs_on_a_gpu(monkeypatch, torch_cuda, driver, available, compiled, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    card = type("Card", (), {"name": "a card", "major": 0, "minor": 0, "total_memory": 2**34})
    if capability:
        card.major, card.minor = capability
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(_C, "cuda_driver_version", lambda: driver)
    monkeypatch.setattr(_C, "cuda_architectures", compiled)
    monkeypatch.setattr(_C, "cuda_runtime_version", 13000)
    why = _cuda.absence()
    assert why is None if expected is None else expected in why
    lines = gpu()
    assert len(lines) == available + (why is not None)
    if available:
        assert lines[0].startswith("cuda:0 a card, sm_") and "16.0 GiB" in lines[0]
        slow = [note for note in notes(1, 1) if note.startswith("a GPU is here")]
        assert len(slow) == (why is not None)


def test_other_devices_are_refused_by_name(monkeypatch):
    x, w = torch.empty(2, 8, device="meta"), torch.ones(8)
    monkeypatch.setattr(torch.Tensor, "device", property(lambda t: torch.device("xpu")))
    with pytest.raises(ValueError, match="rms_norm_gated: x is on device xpu, expected cpu or cuda"):
        pyseq.rms_norm_gated(x, w)


def test_a_build_without_cuda_kernels_says_so(monkeypatch):
    monkeypatch.setattr(_C, "cuda_ops", [])
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(2, 8, device="cuda"), torch.empty(8, device="cuda")
    with pytest.raises(ValueError, match=r"rms_norm_gated: x is on a GPU, and this pyseq was built without CUDA"):
        pyseq.rms_norm_gated(x, w)


@pytest.mark.parametrize(
    ("name", "absence", "expected"),
    [
        ("cpu", "no GPU", "cpu"),
        (None, "no GPU", "cpu"),
        (None, None, "cuda:1"),
        ("cuda", None, "device 'cuda': no kernels were compiled for this card"),
        ("cuda:1", None, "cuda:1"),
        ("cuda:0", None, "device 'cuda:0': no kernels were compiled for this card"),
        ("cuda", "torch sees no GPU", "device 'cuda': torch sees no GPU"),
        ("cuda:2", None, "device 'cuda:2': there are 2 GPUs here, counted from 0"),
        ("tpu", None, "device 'tpu': expected cpu, cuda or cuda:<number>"),
        ("mps", None, "device 'mps': expected cpu, cuda or cuda:<number>"),
        ("cuda:x", None, "device 'cuda:x': expected"),
    ],
)
def test_a_device_is_usable_or_the_reason_is_told(monkeypatch, name, absence, expected):
    """Beside a card with kernels, the second, stands one without."""
    monkeypatch.setattr(_cuda, "absence", lambda: absence)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(7, 5), (9, 0)][i])
    monkeypatch.setattr(_C, "cuda_architectures", COMPILED)
    if expected.startswith("device"):
        with pytest.raises(ValueError, match=f"^{expected}"):
            _cuda.usable_device(name)
    else:
        assert _cuda.usable_device(name) == expected
