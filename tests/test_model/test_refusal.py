"""Models that cannot be compressed are refused by their config alone, with the reason."""

from __future__ import annotations

import types

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES, find_architecture

KNOWN = {architecture.model_type: architecture for architecture in BUILTIN_ARCHITECTURES}


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "a norm after attention or MLP"),
        ("olmo2", "a norm after attention or MLP"),
        ("exaone4", "a norm after attention or MLP"),
        ("gemma", "the square root of hidden_size"),
        ("olmo", "LayerNorm"),
        ("gpt2", "LayerNorm"),
        ("starcoder2", "LayerNorm"),
        ("mixtral", "experts"),
        ("gpt_oss", "experts"),
        ("minicpm3", "latent attention"),
        ("mamba", "state space"),
        ("jamba", "state space"),
        ("lfm2", "state space"),
        ("t5", "encoder"),
        ("llava", "multimodal"),
        ("gemma3", "multimodal"),
        ("helium", "o_proj has hidden_size inputs"),
    ],
)
def test_the_reason_is_named(model_type, reason) -> None:
    with pytest.raises(ValueError, match=f"model type '{model_type}' is not supported: .*{reason}.*support.md"):
        find_architecture(CONFIG_MAPPING[model_type](), KNOWN)


def test_a_type_that_transformers_does_not_know() -> None:
    config = types.SimpleNamespace(model_type="own", rms_norm_eps=1e-6)
    with pytest.raises(
        ValueError, match=r"model type 'own' is not supported: nobody has described .* a plugin can add"
    ):
        find_architecture(config, KNOWN)
    with pytest.raises(ValueError, match="model type None is not supported"):
        find_architecture(types.SimpleNamespace(), KNOWN)


@pytest.mark.parametrize("model_type", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - KNOWN.keys()))
@pytest.mark.filterwarnings("ignore")
def test_every_causal_model_of_transformers_is_built_in_or_has_a_reason(model_type) -> None:
    """A failure means that a new transformers has a new family: describe it, or say in refusal.py why not."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:
        pytest.skip("its config has no defaults")
    with pytest.raises(ValueError, match="is not supported: it") as raised:
        find_architecture(config, KNOWN)
    assert "\n" not in str(raised.value)
