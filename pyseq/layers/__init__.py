"""Layers: parameters and projections around one op each."""

from pyseq.layers.delta_heads import DeltaState
from pyseq.layers.gated_delta_net import GatedDeltaNet
from pyseq.layers.kimi_delta_attention import KimiDeltaAttention
from pyseq.layers.mamba import Mamba, MambaState
from pyseq.layers.mamba2 import Mamba2, Mamba2State

__all__ = ["DeltaState", "GatedDeltaNet", "KimiDeltaAttention", "Mamba", "Mamba2", "Mamba2State", "MambaState"]
