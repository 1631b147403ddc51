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


@pytest.fixture
def tiny2(tiny):
    """`tiny` of Mamba-2 layers: 8 heads of 8 channels in 2 groups."""

    def make(dtype=None, **options):
        layer_args = {"headdim": 8, "ngroups": 2, **options.pop("layer_args", {})}
        return tiny(dtype=dtype, layer="Mamba2", layer_args=layer_args, **options)

    return make


@pytest.fixture
def tiny7():
    """`tiny` of RWKV-7 layers: 4 heads of 8 channels."""

    def make(dtype=None, **options):
        config = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "layer": "RWKV7", "tie_embeddings": False, **options}
        config["layer_args"] = {"head_size": 8, **options.pop("layer_args", {})}
        return shake(CausalLM, Config(**config), dtype=dtype)

    return make


@pytest.fixture
def padded(tiny2):
    """61 tokens in 64 rows, as the original checkpoints pad."""
    return lambda **options: tiny2(pad_vocab_size_multiple=16, **options)


@pytest.fixture(params=["tiny", "tiny2", "tiny7"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["mamba", "falcon_mamba", "mamba2", "mamba2 of 3 groups"])
def theirs(request):
    """A factory of transformers models of one family."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    Config, Model = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
        "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    }[request.param.split()[0]]

    def make(**options):
        sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}
        if Model is transformers.Mamba2ForCausalLM:
            heads = options.get("expand", 2) * 48 // 8
            groups = 3 if request.param.endswith("3 groups") else 1
            sizes |= {"num_heads": heads, "head_dim": 8, "n_groups": groups, "tie_word_embeddings": True}
        return shake(Model, Config(**{**sizes, **options}))

    make.Model = Model
    return make
