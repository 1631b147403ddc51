"""Layers: parameters and projections around one op each."""

from pyseq.layers.mamba import Mamba, MambaState
from pyseq.layers.mamba2 import Mamba2, Mamba2State

__all__ = ["Mamba", "Mamba2", "Mamba2State", "MambaState"]
