"""Models: a causal language model around any layer, its checkpoints, text and generation."""

from pyseq.models import state
from pyseq.models.causal_lm import CausalLM, Output
from pyseq.models.config import Config
from pyseq.models.convert import convert_checkpoint
from pyseq.models.pretrained import from_pretrained
from pyseq.models.text import ByteTokenizer, JsonTokenizer
from pyseq.models.world import WorldTokenizer

__all__ = [
    "ByteTokenizer",
    "CausalLM",
    "Config",
    "JsonTokenizer",
    "Output",
    "WorldTokenizer",
    "convert_checkpoint",
    "from_pretrained",
    "state",
]
