"""pyseq: linear-recurrence sequence layers for PyTorch, with CPU (SIMD) and CUDA kernels of their own."""

import torch  # noqa: F401  (first: _C takes torch's libraries from the process)

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pyseq's compiled module is missing or does not load: install the package (`make install` in a checkout). "
        f"The loader said: {error}"
    ) from error

from . import models, reference
from ._explain import explain
from .layers.cross_wkv import CrossWKV
from .layers.gated_delta_net import GatedDeltaNet
from .layers.kimi_delta_attention import KimiDeltaAttention
from .layers.mamba import Mamba
from .layers.mamba2 import Mamba2
from .layers.rwkv7 import RWKV7
from .models.pretrained import from_pretrained
from .ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from .ops.delta_rule import delta_rule, delta_rule_step, gla, gla_step, rwkv7, rwkv7_step
from .ops.ema import ema, ema_step
from .ops.gated_delta_rule import (
    delta_net,
    delta_net_step,
    gated_delta_rule,
    gated_delta_rule_step,
    kimi_delta_rule,
    kimi_delta_rule_step,
)
from .ops.linear import PackedLinear, linear, pack_linear
from .ops.mamba2_step import mamba2_step
from .ops.mamba_step import mamba_step
from .ops.rms_norm_gated import rms_norm_gated
from .ops.selective_scan import selective_scan, selective_scan_step
from .ops.ssd import ssd, ssd_step

__version__ = "0.1.0"
__all__ = [
    "RWKV7",
    "CrossWKV",
    "GatedDeltaNet",
    "KimiDeltaAttention",
    "Mamba",
    "Mamba2",
    "PackedLinear",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_net",
    "delta_net_step",
    "delta_rule",
    "delta_rule_step",
    "ema",
    "ema_step",
    "explain",
    "from_pretrained",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gla",
    "gla_step",
    "kimi_delta_rule",
    "kimi_delta_rule_step",
    "linear",
    "mamba2_step",
    "mamba_step",
    "models",
    "pack_linear",
    "reference",
    "rms_norm_gated",
    "rwkv7",
    "rwkv7_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
