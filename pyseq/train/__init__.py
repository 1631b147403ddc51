"""Training of causal language models on text: `train(Settings(...), folder)` and `resume(folder)`."""

from .loop import Result, Watcher, resume, train
from .settings import PRESETS, Settings, preset

__all__ = ["PRESETS", "Result", "Settings", "Watcher", "preset", "resume", "train"]
