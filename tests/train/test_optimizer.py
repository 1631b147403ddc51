from __future__ import annotations

import pytest

from pyseq.models import CausalLM, Config
from pyseq.train.optimizer import adamw, decays, rate


def test_only_matrices_decay() -> None:
    model = CausalLM(Config(d_model=8, n_layer=1, vocab_size=16, layer_args={"d_state": 4, "bias": True}))
    decaying = {name.rsplit("mixer.", 1)[-1] for name, p in model.named_parameters() if decays(name, p)}
    assert decaying == {
        "backbone.embeddings.weight",
        *(f"{part}.weight" for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")),
    }
    groups = adamw(model, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_rate_rises_to_its_peak_and_falls_to_its_final_share() -> None:
    rates = [rate(step, 100, 10, 2.0, 0.1) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == rates[10] == pytest.approx(2.0)
        and rates[99] == pytest.approx(0.2)
    )
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_the_warm_up_takes_at_most_half_of_the_run() -> None:
    assert [rate(step, 4, 100, 1.0, 0.0) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.0])
    assert rate(0, 1, 100, 1.0, 0.1) == pytest.approx(1.0)
