"""Layers: parameters and projections around one op each."""

from pyseq.layers.cross_wkv import CrossWKV, CrossWKVState
from pyseq.layers.delta_heads import DeltaState
from pyseq.layers.gated_delta_net import GatedDeltaNet
from pyseq.layers.kimi_delta_attention import KimiDeltaAttention
from pyseq.layers.mamba import Mamba, MambaState
from pyseq.layers.mamba2 import Mamba2, Mamba2State
from pyseq.layers.rwkv7 import RWKV7, RWKV7State
from pyseq.layers.rwkv7_channel import RWKV7ChannelMix
from pyseq.layers.rwkv7_time import RWKV7TimeMix

__all__ = [
    "RWKV7",
    "CrossWKV",
    "CrossWKVState",
    "DeltaState",
    "GatedDeltaNet",
    "KimiDeltaAttention",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "RWKV7ChannelMix",
    "RWKV7State",
    "RWKV7TimeMix",
]
