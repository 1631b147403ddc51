"""State tracking: word problems of groups, parity, modular arithmetic, and models trained on them.

`find(name)` gives a task, `train(Settings(...), folder)` trains a model on it and measures it at other lengths.
"""

from .groups import Group, group
from .problems import EvenPairs, GroupWords, ModularArithmetic, Parity, Task, find
from .settings import Settings
from .training import Result, train

__all__ = [
    "EvenPairs", "Group", "GroupWords", "ModularArithmetic", "Parity", "Result", "Settings", "Task", "find", "group",
    "train",
]  # fmt: skip
