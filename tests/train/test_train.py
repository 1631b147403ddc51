from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pyseq.train.evaluate
from pyseq.models import from_pretrained
from pyseq.train import PRESETS, Settings, train
from pyseq.train.chart import Curve, as_text
from pyseq.train.corpus import open_corpus


def test_a_run_learns_and_leaves_what_it_says(tmp_path: Path, tiny: Settings) -> None:
    result = train(dataclasses.replace(tiny, steps=60, learning_rate=2e-2), tmp_path / "run")
    records = [json.loads(line) for line in result.log.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    held_out = [record["held_out_bits_per_byte"] for record in records if "held_out_bits_per_byte" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert held_out[0] == pytest.approx(8, abs=0.1) and held_out[-1] < 5
    assert result.held_out == held_out[-1] and result.complete
    for record in steps:  # the text is ASCII but for one line: a token is a byte
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2))
        assert record["bytes"] == record["step"] * 32
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    corpus = open_corpus(tmp_path / "run" / "data")
    model = from_pretrained(result.checkpoint)
    assert pyseq.train.evaluate.bits_per_byte(model, corpus.held_out) == held_out[-1]


def test_a_run_of_mamba2_learns(tmp_path: Path, tiny: Settings) -> None:
    settings = dataclasses.replace(tiny, layer="Mamba2", headdim=4, d_state=8, steps=60, learning_rate=2e-2)
    result = train(settings, tmp_path / "run")
    assert result.held_out is not None and result.held_out < 5
    model = from_pretrained(result.checkpoint)
    assert model.config.layer == "Mamba2" and model.config.layer_args == {"d_state": 8, "headdim": 4}


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, tiny: Settings) -> None:
    """Same tokens in a step, so the same mean gradient up to rounding."""
    text = Path(tiny.data[0]) / "all.txt"
    text.write_text("".join(path.read_text() for path in sorted(Path(tiny.data[0]).rglob("*.txt"))))
    base = dataclasses.replace(tiny, data=(str(text),), carry_state=False, steps=1, warmup=0, length=8)
    norms = []
    for batch, accumulate in ((4, 1), (2, 2)):
        run = train(dataclasses.replace(base, batch=batch, accumulate=accumulate), tmp_path / f"{batch}")
        norms.append(json.loads(run.log.read_text().splitlines()[1])["gradient_norm"])
    assert all(math.isfinite(norm) and norm > 0 for norm in norms)


def test_a_diverging_run_stops_with_a_reason(tmp_path: Path, tiny: Settings) -> None:
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        train(dataclasses.replace(tiny, learning_rate=1e30, warmup=0), tmp_path / "run")


def test_a_run_starts_from_a_checkpoint(tmp_path: Path, tiny: Settings) -> None:
    first = train(tiny, tmp_path / "first")
    second = train(dataclasses.replace(tiny, start_from=str(first.checkpoint), steps=1), tmp_path / "second")
    begin = json.loads(second.log.read_text().splitlines()[0])
    assert begin == {"step": 0, "bytes": 0, "held_out_bits_per_byte": first.held_out}


@pytest.mark.parametrize("kind", [{"layer": "Mamba2", "headdim": 4}, {}])
def test_what_is_said_of_the_layer_is_so_in_the_checkpoint(tmp_path: Path, tiny: Settings, kind: dict) -> None:
    first = train(dataclasses.replace(tiny, steps=1, **kind), tmp_path / "first")
    again = dataclasses.replace(tiny, steps=1, start_from=str(first.checkpoint), d_state=None)
    agrees = {} if kind else {"layer": "Mamba"}
    for number, same in enumerate(({}, {"d_state": 4}, kind, agrees, {"headdim": 4} if kind else {})):
        assert train(dataclasses.replace(again, **same), tmp_path / f"{number}").complete
    other = {"layer": "Mamba"} if kind else {"layer": "Mamba2"}
    for wrong in (other, {"headdim": 8}, {"d_state": 8}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} = .*: the checkpoint to start from has"):
            train(dataclasses.replace(again, **wrong), tmp_path / "refused")


def test_a_tokenised_run(tmp_path: Path, tiny: Settings) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([path.read_text() for path in Path(tiny.data[0]).rglob("*.txt")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    result = train(dataclasses.replace(tiny, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "run")
    model = from_pretrained(result.checkpoint)
    assert model.config.vocab_size == 301 and model.tokenizer.encode("the state") == tokenizer.encode("the state").ids
    begin = json.loads(result.log.read_text().splitlines()[0])
    stream = open_corpus(tmp_path / "run" / "data").held_out
    assert stream.bytes_per_token > 1.5
    assert begin["held_out_bits_per_byte"] == pytest.approx(math.log2(304) / stream.bytes_per_token, rel=0.03)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_state": 0}, "d_state"),
        ({"layer": "Mamba3"}, "layer"),
        ({"layer": "Mamba2", "headdim": 0}, "headdim"),
        ({"headdim": 64}, "headdim"),
        ({"batch": -1}, "batch"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"final_rate": 2.0}, "final_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"held_out": 0}, "held_out"),
        ({"steps": None}, "steps"),
        ({"time_limit": 3.0}, "time_limit"),
        ({"steps": None, "time_limit": math.inf}, "time_limit"),
    ],
)
def test_settings_name_what_is_wrong(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{"steps": 1, **changes})


def test_settings_survive_json() -> None:
    for preset in PRESETS.values():
        settings = Settings(**preset)
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_the_curve_as_text() -> None:
    curve = Curve("", [(x * 1e5, 8 / (1 + x)) for x in range(30)], [(0, 8.0)], 2.0, 1.5)
    lines = as_text(curve, width=40, height=8).splitlines()
    assert len(lines) == 10 and lines[0].startswith(" 8.00 ┤") and lines[-1].endswith("2.9 MB read")
    assert all(len(line) <= 48 for line in lines)
    assert as_text(Curve("", [], [], 2.0, 1.5)) == ""


def test_the_seed_decides(tmp_path: Path, tiny: Settings) -> None:
    results = [
        train(dataclasses.replace(tiny, steps=3, seed=seed), tmp_path / f"{i}") for i, seed in enumerate((0, 0, 1))
    ]
    assert results[0].held_out == results[1].held_out != results[2].held_out
    assert torch.get_num_threads() >= 1
