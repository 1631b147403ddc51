"""Training on a task: it learns, it repeats itself, and the command shows it."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from pyseq.cli import app
from pyseq.tasks import Settings, train

TINY = Settings(d_model=16, heads=2, steps=4, batch=8, train=(3, 10), lengths=(10, 20), samples=16)


@pytest.mark.parametrize("layer", ["gated_delta_net", "kimi_delta_attention", "mamba", "mamba2", "rwkv7"])
def test_a_run_repeats_itself_bit_for_bit(layer, tmp_path):
    settings = dataclasses.replace(TINY, layer=layer, layers=2)
    seen = []
    result = train(settings, tmp_path / "run", lambda step, loss: seen.append((step, loss)))
    assert [step for step, _ in seen] == [1, 2, 3, 4] and result.losses == [loss for _, loss in seen]
    assert [a.length for a in result.accuracies] == [10, 20] and result.chance == 0.5
    again = train(settings)
    assert again.losses == result.losses and again.accuracies == result.accuracies
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4
    assert sum(p.numel() for p in load_file(tmp_path / "run" / "model.safetensors").values()) == result.parameters
    with pytest.raises(ValueError, match="already holds a run"):
        train(settings, tmp_path / "run")


def test_it_learns():
    """To count modulo two, from one of three starts, and then does so in longer words."""
    settings = dataclasses.replace(TINY, d_model=32, steps=150, batch=32, warmup=15, train=(2, 10), learning_rate=1e-2)
    runs = (train(dataclasses.replace(settings, task="z2", seed=seed)) for seed in range(3))
    assert any(r.losses[-1] < 0.1 * r.losses[0] and r.accuracies[1].token > 0.9 for r in runs)


def test_fewer_words_are_right_than_answers():
    settings = dataclasses.replace(TINY, train=(2, 4), lengths=(3, 12))
    result = train(dataclasses.replace(settings, task="s3"))
    assert all(a.sequence <= a.token for a in result.accuracies) and result.chance == 1 / 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "tree"}, {"layer": "attention"}, {"heads": 3}, {"steps": 0}, {"dtype": "bfloat16"},
        {"task": "mod-arithmetic", "lengths": (5,)}, {"train": (9, 3)}, {"device": "tpu"},
    ],
)  # fmt: skip
def test_wrong_settings_name_the_setting(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "lengths" not in wrong else "lengths"):
        train(dataclasses.replace(TINY, **wrong))


SMALL = ["--d-model", "16", "--steps", "3", "--batch", "4", "--length", "8", "--lengths", "8,16"]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_the_command(tmp_path):
    found = json.loads(call("--task", "parity", *SMALL, "--no-negative", "--json").stdout)
    assert found["settings"]["negative"] is False and [a["length"] for a in found["accuracies"]] == [8, 16]
    shown = call("--task", "s3-swaps", "--layer", "mamba2", *SMALL, "--out", tmp_path / "run").stdout
    assert "words right" in shown and "s3-swaps, mamba2" in shown and (tmp_path / "run" / "result.json").exists()


def test_options_of_text_and_of_tasks_do_not_mix():
    for options in (["--heads", 2], ["--lengths", "8"], ["--negative"]):
        assert "--task" in call(*options, code=2).stderr
    for options in (["--d-state", 4], ["--carry-state"], ["notes.txt"], ["--preset", "small"]):
        assert "--task" in call("--task", "parity", *options, code=2).stderr
    assert "lengths" in call("--task", "parity", "--lengths", "a", code=2).stderr
    assert "expected one of" in call("--task", "parity", "--layer", "attention", code=1).stderr
