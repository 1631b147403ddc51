"""Every op as a plain loop in PyTorch: what the kernels are measured against. Runs in float64, differentiable twice."""

from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .delta_rule import delta_rule, delta_rule_step, gla, gla_step, rwkv7, rwkv7_step
from .ema import ema, ema_step
from .gated_delta_rule import (
    delta_net,
    delta_net_step,
    gated_delta_rule,
    gated_delta_rule_step,
    kimi_delta_rule,
    kimi_delta_rule_step,
)
from .linear import linear
from .mamba2_step import mamba2_step
from .mamba_step import mamba_step
from .rms_norm_gated import rms_norm_gated
from .selective_scan import selective_scan, selective_scan_step
from .ssd import ssd, ssd_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_net",
    "delta_net_step",
    "delta_rule",
    "delta_rule_step",
    "ema",
    "ema_step",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gla",
    "gla_step",
    "kimi_delta_rule",
    "kimi_delta_rule_step",
    "linear",
    "mamba2_step",
    "mamba_step",
    "rms_norm_gated",
    "rwkv7",
    "rwkv7_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
