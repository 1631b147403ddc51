"""The pictures of the documentation are drawn from the numbers beside them, to the same bytes each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRAW = """
import sys, json
from pathlib import Path
from demos import {name}
numbers = json.loads({name}.NUMBERS.read_text())
for path in sys.argv[1:]:
    {name}.draw(numbers, Path(path))
"""


@pytest.mark.parametrize("name", ["state_tracking", "digits"])
def test_drawing_repeats_itself(name, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    subprocess.run([sys.executable, "-c", DRAW.format(name=name), one, two], cwd=ROOT, check=True)
    assert one.read_bytes() == two.read_bytes() and len(one.read_bytes()) > 5000


def test_what_the_page_says_of_state_tracking_is_in_its_numbers():
    found = json.loads((ROOT / "docs/state_tracking.json").read_text())
    right = {True: [], False: []}
    for run in found:
        if run["settings"]["task"] == "parity":
            right[run["settings"]["negative"]].append({a["length"]: a["token"] for a in run["accuracies"]})
    assert all(a[128] > 0.9 for a in right[True]) and all(a[40] < 0.7 for a in right[False])
