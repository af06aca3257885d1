"""What a PEFT config may name in a QUAD model: the usual works, the rest is refused before the model is touched."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_peft import OutlierLoraConfig, QuadLoraLayer, get_outlier_model

from .test_adapter import PROBE, logits

Load = Callable[..., PreTrainedModel]
PACKED = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {}
    EmbeddingHeadQuant: {}
    OutlierSplitGPTQ: {bits: 4, method: rtn}
"""
ROLES = ["q_proj", "v_proj"]


@pytest.fixture
def load_packed(make_quad_toy: Callable[..., Any]) -> Callable[[], PreTrainedModel]:
    """Return `load_packed()`: a checkpoint with 8-bit embedding and head."""
    _, folder = make_quad_toy(PACKED)
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


class TestUsualTargets:
    @pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
    def test_those_of_the_stock_architecture(
        self, model_type: str, load: Load, make_toy: Callable[..., PreTrainedModel]
    ) -> None:
        stock = get_peft_model(make_toy(model_type), LoraConfig(r=4, task_type="CAUSAL_LM"))
        model = get_peft_model(load(model_type=model_type), LoraConfig(r=4, task_type="CAUSAL_LM"))
        assert model.peft_config["default"].target_modules == stock.peft_config["default"].target_modules
        adapted = {m.get_base_layer().role for m in model.modules() if isinstance(m, QuadLoraLayer)}
        assert adapted == model.peft_config["default"].target_modules

    @pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # as of any norm of its own kind
    def test_of_another_method(self, load: Load) -> None:
        model = get_peft_model(load(), LNTuningConfig(task_type="CAUSAL_LM"))
        model(PROBE, labels=PROBE).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=ROLES, use_dora=True), "has no use_dora"),
        (LoraConfig(target_modules=ROLES, use_qalora=True), "has no use_qalora"),
        (LoraConfig(target_modules=ROLES, init_lora_weights="pissa"), "has no init_lora_weights"),
        (LoraConfig(target_modules=ROLES, init_lora_weights="olora"), "has no init_lora_weights"),
        (LoraConfig(target_modules=ROLES, init_lora_weights="orthogonal"), "has no init_lora_weights"),
        (
            LoraConfig(target_modules=ROLES, task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            "has no alora_invocation_tokens",
        ),
        (LoraConfig(target_modules="all-linear"), "name the layers themselves"),
        (LoraConfig(target_modules=["residual"]), r"inside of a QUAD layer \(model.layers.0.self_attn.q_proj.residual"),
        (LoraConfig(target_modules=r".*layers\.0.*q_proj.*"), "reaches inside"),
        (LoraConfig(target_parameters=["outlier.weight"]), r"target_parameters reaches .*q_proj\.outlier\.weight"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]), r"o_proj cannot be trained, for .*o_proj"),
        (
            LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]),
            r"mlp cannot be trained, for .*mlp\.gate_proj",
        ),
        (OutlierLoraConfig(modules_to_save=["down_proj"]), r"down_proj cannot be trained"),
        (AdaLoraConfig(target_modules=ROLES, total_step=9), r"AdaLoraConfig cannot adapt model\.layers\.0.*q_proj"),
        (IA3Config(target_modules=ROLES, feedforward_modules=[]), "IA3Config cannot adapt"),
        (IA3Config(target_modules=["outlier"], feedforward_modules=[]), "reaches inside"),
        (LoKrConfig(target_modules="all-linear"), "reaches inside"),
        (LoHaConfig(target_modules=ROLES), "LoHaConfig cannot adapt"),
        (OFTConfig(target_modules=ROLES), "OFTConfig cannot adapt"),
        (VeraConfig(target_modules=ROLES), "VeRA"),
        (XLoraConfig(hidden_size=64, adapters={"0": "nowhere"}), "XLoraConfig mixes adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_and_unchanged(config: Any, message: str, load: Load) -> None:
    model = load()
    model.config.use_cache = False  # which XLoRA demands
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "cannot adapt lm_head, an 8-bit table"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"]), r"cannot adapt model\.embed_tokens, an 8-bit table"),
        (LoraConfig(target_modules=ROLES, modules_to_save=["lm_head"]), "lm_head cannot be trained"),
        (OutlierLoraConfig(modules_to_save=["embed_tokens"]), r"model\.embed_tokens cannot be trained"),
        (LoraConfig(target_modules=ROLES, trainable_token_indices=[5]), r"rows of model\.embed_tokens"),
        (LoraConfig(target_modules=ROLES, trainable_token_indices={"lm_head": [5]}), "rows of lm_head"),
        (TrainableTokensConfig(token_indices=[5]), r"rows of model\.embed_tokens"),
        (TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]), r"rows of model\.embed_tokens"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"),
            "starts from rows of the embedding",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_packed_tables_are_refused(config: Any, message: str, load_packed: Callable[[], PreTrainedModel]) -> None:
    model = load_packed()
    before, names = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


def test_virtual_tokens_before_a_packed_embedding(load_packed: Callable[[], PreTrainedModel], tmp_path) -> None:
    model = get_peft_model(load_packed(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model(PROBE, labels=PROBE).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load_packed(), tmp_path)), logits(model))


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head", "q_proj"]], ids=str)
def test_floating_point_ends_take_a_lora(targets: list[str], load: Load) -> None:
    model = get_peft_model(load(), LoraConfig(r=4, target_modules=targets))
    model(PROBE, labels=PROBE).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj", "qv_proj"]}, {"target_modules": ROLES, "modules_to_save": ["qv_proj"]}]
)
def test_names_of_nothing_are_warned_of(
    fields: dict[str, list[str]], load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        get_peft_model(load(), LoraConfig(**fields))
    assert "nothing in the model is named qv_proj" in caplog.text


def test_names_that_match_are_not_warned_of(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(load(), LoraConfig(target_modules=ROLES, modules_to_save=["lm_head"]))
        model.add_adapter("second", LoraConfig(target_modules=ROLES))
        get_outlier_model(load())
    assert "nothing in the model" not in caplog.text


def test_more_fields_that_an_outlier_adapter_has_not(load: Load) -> None:
    with pytest.raises(ValueError, match="an outlier adapter has no alora_invocation_tokens"):
        OutlierLoraConfig(alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="an outlier adapter has no use_qalora"):
        OutlierLoraConfig(use_qalora=True)
