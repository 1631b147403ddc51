"""Tiny models with random weights, of our own and of transformers."""

import pytest
import torch

from pyseq.models import CausalLM, Config


def shake(make, *args, **options):
    """A model with random values in every parameter, so that none is a no-op."""
    torch.manual_seed(0)
    model = make(*args, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def tiny():
    def make(dtype=None, **options):
        layer_args = {"d_state": 8, **options.pop("layer_args", {})}
        config = Config(**{"d_model": 32, "n_layer": 2, "vocab_size": 61, "layer_args": layer_args, **options})
        return shake(CausalLM, config, dtype=dtype)

    return make


@pytest.fixture(params=["mamba", "falcon_mamba"])
def theirs(request):
    """A factory of transformers models of one family."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Config, Model = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    }[request.param]

    def make(**options):
        sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}
        return shake(Model, Config(**{**sizes, **options}))

    make.Model = Model
    return make
