"""Every op as a plain loop in PyTorch: what the kernels are measured against. Runs in float64, differentiable twice."""

from .rms_norm_gated import rms_norm_gated

__all__ = ["rms_norm_gated"]
