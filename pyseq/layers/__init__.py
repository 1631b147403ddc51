"""Layers: parameters and projections around one op each."""

from pyseq.layers.mamba import Mamba, MambaState

__all__ = ["Mamba", "MambaState"]
