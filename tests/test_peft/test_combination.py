"""Weighted combinations of adapters are exact, or refused before the model is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from transformers import PreTrainedModel

from quad_peft import OutlierLoraConfig, QuadLoraLayer, equalize_outliers, get_outlier_model

from .test_adapter import PROBE, logits, shake

Load = Callable[..., PreTrainedModel]
WEIGHTS = {"first": 0.5, "second": -0.75}


def two_adapters(load: Load, scales: bool = True) -> PeftModel:
    model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=scales), adapter_name="first")
    equalize_outliers(model, PROBE, "first")
    model.add_adapter("second", OutlierLoraConfig())
    shake(model, "first")
    shake(model, "second", seed=1)
    return model.eval()


def layers(model: PeftModel) -> list[QuadLoraLayer]:
    return [module for module in model.modules() if isinstance(module, QuadLoraLayer)]


@torch.no_grad()
def error(layer: QuadLoraLayer, name: str, weights: dict[str, float]) -> float:
    wanted = sum(weight * layer.get_delta_weight(adapter) for adapter, weight in weights.items())
    return float((layer.get_delta_weight(name) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["linear", "svd", "cat"])
@pytest.mark.parametrize("weights", [WEIGHTS, {"first": 0.5}, {"second": -2.0}], ids=str)
def test_sums_are_exact(kind: str, weights: dict[str, float], load: Load, tmp_path: Path) -> None:
    model = two_adapters(load)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind)
    for layer in layers(model):
        assert error(layer, "sum", weights) < 1e-6
        if "first" in weights:
            scale = layer.lora_weight_scale
            torch.testing.assert_close(scale["sum"], weights["first"] * scale["first"])
    assert model.active_adapters == ["first"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum" in name)
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "sum")), expected)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)


def test_a_sum_is_what_two_active_adapters_do(load: Load) -> None:
    model = two_adapters(load)
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    model.base_model.set_adapter(["first", "second"])
    both = logits(model)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both)


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_pruned_changes(kind: str, load: Load) -> None:
    model = two_adapters(load, scales=False)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mix", kind, density=0.5)
    prune = getattr(merge_utils, kind.removesuffix("_svd"))
    for layer in layers(model):
        changes = [layer.outlier_change(name) for name in WEIGHTS]
        wanted = prune(changes, torch.tensor(list(WEIGHTS.values())), 0.5)
        torch.testing.assert_close(layer.outlier_change("mix"), wanted)


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")  # PEFT's own words on keeping everything
@pytest.mark.parametrize("kind", ["dare_linear", "dare_linear_svd", "dare_ties"])
def test_randomly_pruned_changes_keep_what_density_says(kind: str, load: Load) -> None:
    model = two_adapters(load)
    model.add_weighted_adapter(["first"], [0.5], "all", kind, density=1.0)
    assert all(error(layer, "all", {"first": 0.5}) < 1e-6 for layer in layers(model))
    model.add_weighted_adapter(["first"], [0.5], "part", kind, density=0.25)
    kept = torch.cat([layer.outlier_change("part").flatten() != 0 for layer in layers(model)])
    assert 0.2 < float(kept.float().mean()) < 0.3


def test_adapters_of_different_layers(load: Load) -> None:
    model = get_outlier_model(load(), OutlierLoraConfig(target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", OutlierLoraConfig(target_modules=["v_proj", "down_proj"]))
    shake(model, "first")
    shake(model, "second", seed=1)
    model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum")
    for layer in layers(model):
        name, weight = ("first", 0.5) if layer.get_base_layer().role == "q_proj" else ("second", 2.0)
        assert error(layer, "sum", {name: weight}) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "mean"}, "combination_type is 'mean'"),
        ({"svd_rank": 3}, r"without svd_rank \(3\)"),
        ({"svd_clamp": 0.9}, "without svd_clamp"),
        ({"combination_type": "ties"}, "needs a density from 0 to 1"),
        ({"adapters": ["first", "nobody"]}, "there is no adapter 'nobody'; there are first, second, plain"),
        ({"adapters": ["first"]}, "2 weights for adapters"),
        ({"adapters": ["first", "first"]}, "each is named once"),
        ({"adapters": ["first", "plain"]}, "'plain' is no outlier adapter"),
        ({"adapter_name": "second"}, "there is an adapter 'second' already"),
    ],
    ids=str,
)
def test_refused(arguments: dict[str, object], message: str, load: Load) -> None:
    model = two_adapters(load)
    model.add_adapter("plain", LoraConfig(r=8, target_modules=["q_proj"]))
    before = [name for name, _ in model.named_modules()]
    given = {"adapters": ["first", "second"], "weights": [0.5, 0.5], "adapter_name": "mix", **arguments}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**given)
    assert [name for name, _ in model.named_modules()] == before
    assert set(model.peft_config) == {"first", "second", "plain"}


def test_adapters_with_modules_of_their_own_are_refused(load: Load) -> None:
    model = get_outlier_model(load(), OutlierLoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="'default' has modules_to_save"):
        model.add_weighted_adapter(["default"], [0.5], "half")


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_plain_loras_are_combined_by_peft(kind: str, load: Load) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(load(), config, adapter_name="first")
    model.add_adapter("second", config)
    shake(model, "first")
    shake(model, "second", seed=1)
    options = {"svd_rank": 8} if kind == "svd" else {}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "sum", kind, **options)
    assert all(error(layer, "sum", WEIGHTS) < 1e-5 for layer in layers(model))
