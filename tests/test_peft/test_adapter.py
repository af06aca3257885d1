"""Outlier adapters under PEFT's own functions: train, save, load, merge, several at once; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft import OutlierLoraConfig, QuadLoraLayer, equalize_outliers, get_outlier_model

PROBE = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(99))
ROLES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

Load = Callable[..., PreTrainedModel]


@torch.no_grad()
def logits(model: torch.nn.Module, **arguments: object) -> torch.Tensor:
    return model(PROBE, **arguments).logits


def shake(model: PeftModel, adapter: str = "default", size: float = 0.05, seed: int = 0) -> None:
    """Gives an adapter random values in place of its zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(f"lora_weight_scale.{adapter}"):
                parameter.copy_(1e-3 * torch.rand(parameter.shape, generator=generator))


class TestTraining:
    def test_a_new_adapter_changes_nothing(self, load: Load) -> None:
        model = load()
        before = logits(model)
        assert torch.equal(logits(get_outlier_model(model)), before)

    def test_only_outlier_weights_are_trained_and_all_of_them(self, load: Load) -> None:
        model = get_outlier_model(load())
        model(PROBE, labels=PROBE).loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        layers = [m for m in model.modules() if isinstance(m, QuadLinear)]
        assert sum(p.numel() for p in trained.values()) == sum(m.outlier.weight.numel() for m in layers)
        assert all("lora_B" in name and p.dtype == torch.float32 for name, p in trained.items())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())

    def test_the_gradient_is_that_of_the_outlier_weight(self, load: Load) -> None:
        plain, adapted = load(), get_outlier_model(load())
        for module in plain.modules():
            if isinstance(module, QuadLinear):
                module.outlier.weight.requires_grad_(True)
        for model in (plain, adapted):
            model(PROBE, labels=PROBE).loss.backward()
        expected = [m.outlier.weight.grad for m in plain.modules() if isinstance(m, QuadLinear)]
        found = [m.lora_B["default"].weight.grad for m in adapted.modules() if isinstance(m, QuadLoraLayer)]
        torch.testing.assert_close(found, expected)

    def test_steps_lower_the_loss(self, load: Load) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=True))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(8):
            loss = model(PROBE, labels=PROBE).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.1

    def test_weight_scales_are_trained_when_asked(self, load: Load) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=True))
        model(PROBE, labels=PROBE).loss.backward()
        scales = [p for name, p in model.named_parameters() if "lora_weight_scale" in name]
        layers = [m for m in model.modules() if isinstance(m, QuadLinear)]
        assert len(scales) == len(layers)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales)

    def test_chosen_roles_only(self, load: Load) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(target_modules=["v_proj", "down_proj"]))
        adapted = {m.get_base_layer().role for m in model.modules() if isinstance(m, QuadLoraLayer)}
        assert adapted == {"v_proj", "down_proj"}

    def test_gradient_checkpointing_gives_the_same_gradients(self, load: Load) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = get_outlier_model(load())
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model(PROBE, labels=PROBE).loss.backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(gradients[0], gradients[1])

    def test_nothing_as_wide_as_a_weight_is_kept_for_the_backward_pass(self, load: Load) -> None:
        model = get_outlier_model(load())
        shapes = {(m.out_features, m.split.residual_width) for m in model.modules() if isinstance(m, QuadLinear)}
        kept: list[tuple[int, ...]] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(PROBE, labels=PROBE)
        assert kept
        assert not shapes & {shape for shape in kept if len(shape) == 2} - {(320, 72), (72, 320)}


class TestFolder:
    def test_save_and_load(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load())
        shake(model)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), expected)

    def test_it_is_a_lora_folder(self, load: Load, tmp_path: Path) -> None:
        """Ranks and scaling as PEFT and vLLM read them; A picks coordinates; B A is the change of the dense weight."""
        model = get_outlier_model(load())
        shake(model)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert config["peft_type"] == "LORA"
        assert set(config["target_modules"]) == ROLES
        assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
        for name, first in tensors.items():
            if ".lora_A." in name:
                role = name.split(".")[-3]
                rank = config["rank_pattern"].get(role, config["r"])
                assert config["alpha_pattern"].get(role, config["lora_alpha"]) == rank == first.shape[0]
                assert first.sum(1).eq(1).all()
                assert first.ne(0).sum(1).eq(1).all()
                layer = model.get_submodule(name.removesuffix(".lora_A.weight"))
                product = tensors[name.replace("lora_A", "lora_B")] @ first.float()
                torch.testing.assert_close(product, layer.get_delta_weight("default"))

    def test_weight_scales_travel_with_the_adapter(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=True))
        shake(model)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(), tmp_path)
        assert loaded.peft_config["default"].train_weight_scales
        assert torch.equal(logits(loaded), expected)

    def test_loaded_to_go_on_training(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load())
        shake(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(), tmp_path, is_trainable=True)
        loaded(PROBE, labels=PROBE).loss.backward()
        assert all(p.grad is not None for name, p in loaded.named_parameters() if "lora_B" in name)

    def test_adapter_of_another_base(self, load: Load, tmp_path: Path) -> None:
        get_outlier_model(load()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="trained on another checkpoint"):
            PeftModel.from_pretrained(load(seed=1), tmp_path)

    def test_fingerprint_in_another_dtype(self, quad_folder: Callable[..., Path], tmp_path: Path) -> None:
        half = AutoModelForCausalLM.from_pretrained(quad_folder(), dtype=torch.bfloat16)
        get_outlier_model(half).save_pretrained(tmp_path)
        whole = AutoModelForCausalLM.from_pretrained(quad_folder(), dtype=torch.float32)
        assert isinstance(PeftModel.from_pretrained(whole, tmp_path), PeftModel)

    def test_an_edited_selector_is_refused(self, load: Load, tmp_path: Path) -> None:
        get_outlier_model(load()).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = tensors[name].roll(1, dims=1)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="does not select the"):
            PeftModel.from_pretrained(load(), tmp_path)


class TestEqualizing:
    def test_coordinates_get_like_magnitude_and_nothing_changes(self, load: Load) -> None:
        model = get_outlier_model(load())
        before = logits(model)
        equalize_outliers(model, PROBE)
        assert torch.equal(logits(model), before)
        ratios: list[float] = []

        def measure(layer: QuadLoraLayer, inputs: tuple[torch.Tensor, ...]) -> None:
            raw, _ = layer.get_base_layer().split.divide(inputs[0])
            for each in (raw, layer.lora_A["default"](inputs[0])):
                magnitude = each.flatten(0, -2).pow(2).mean(0).sqrt()
                ratios.append(float(magnitude.max() / magnitude.min()))

        hooks = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, QuadLoraLayer)]
        logits(model)
        for hook in hooks:
            hook.remove()
        raw, scaled = ratios[::2], ratios[1::2]
        assert max(raw) > 2.1
        assert max(scaled) <= 2.01  # powers of two leave a factor of sqrt(2) on either side

    def test_the_scales_travel_with_the_adapter(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load())
        equalize_outliers(model, PROBE)
        shake(model)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(), tmp_path)
        assert torch.equal(logits(loaded), expected)
        layer = next(m for m in loaded.modules() if isinstance(m, QuadLoraLayer))
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            layer.lora_B["default"](layer.lora_A["default"](x)), x @ layer.get_delta_weight("default").T
        )
        loaded.merge_adapter()
        assert torch.equal(logits(loaded), expected)

    def test_dead_inputs_are_left_as_they_are(self, load: Load) -> None:
        model = get_outlier_model(load())
        with torch.no_grad():
            model.get_base_model().model.layers[0].input_layernorm.weight.zero_()
        equalize_outliers(model, PROBE)
        scales = [m.lora_A["default"].scale for m in model.modules() if isinstance(m, QuadLoraLayer)]
        assert all(bool(scale.isfinite().all()) for scale in scales)

    def test_not_after_training(self, load: Load) -> None:
        model = get_outlier_model(load())
        shake(model)
        with pytest.raises(ValueError, match="trained already"):
            equalize_outliers(model, PROBE)

    def test_a_plain_lora_is_left_alone(self, load: Load) -> None:
        model = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj"]))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        equalize_outliers(model, PROBE)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestMerging:
    @pytest.mark.parametrize("scales", [False, True])
    def test_merged_equals_unmerged_and_back(self, load: Load, scales: bool) -> None:
        model = get_outlier_model(load(torch.bfloat16), OutlierLoraConfig(train_weight_scales=scales))
        plain = logits(model)
        shake(model)
        expected = logits(model)
        assert not torch.equal(plain, expected)
        model.merge_adapter()
        assert torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    @pytest.mark.parametrize("scales", [False, True])
    def test_a_merged_model_is_a_quad_checkpoint(self, load: Load, tmp_path: Path, scales: bool) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=scales))
        shake(model)
        expected = logits(model)
        model.merge_and_unload().save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(logits(again), expected)
        assert not any(isinstance(module, QuadLoraLayer) for module in again.modules())

    def test_an_adapter_does_not_fit_its_own_merged_checkpoint(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load())
        shake(model)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="another checkpoint"):
            PeftModel.from_pretrained(model.merge_and_unload(), tmp_path)

    def test_unload_leaves_the_base(self, load: Load) -> None:
        model = load()
        plain = logits(model)
        adapted = get_outlier_model(model)
        shake(adapted)
        assert torch.equal(logits(adapted.unload()), plain)

    def test_nan_is_found_before_merging(self, load: Load) -> None:
        model = get_outlier_model(load())
        shake(model)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            model.merge_adapter(safe_merge=True)


class TestSeveral:
    def test_switching(self, load: Load) -> None:
        model = get_outlier_model(load())
        model.add_adapter("second", OutlierLoraConfig())
        shake(model)
        shake(model, "second", seed=1)
        first = logits(model)
        model.set_adapter("second")
        second = logits(model)
        assert not torch.allclose(first, second)
        model.set_adapter("default")
        assert torch.equal(logits(model), first)

    def test_two_at_once_add_up(self, load: Load) -> None:
        model = get_outlier_model(load())
        model.add_adapter("second", OutlierLoraConfig())
        shake(model)
        shake(model, "second", seed=1)
        model.base_model.set_adapter(["default", "second"])
        both = logits(model)
        model.merge_adapter(adapter_names=["default", "second"])
        assert torch.equal(logits(model), both)

    def test_mixed_batch(self, load: Load) -> None:
        model = get_outlier_model(load())
        model.add_adapter("second", OutlierLoraConfig())
        shake(model)
        shake(model, "second", seed=1)
        for module in model.modules():
            if isinstance(module, QuadLinear):
                module.quantize_input = False  # the last bit of a float32 sum may move an input to the next grid point
        alone = []
        for name in ("default", "second"):
            model.set_adapter(name)
            alone.append(logits(model))
        model.eval()
        mixed = logits(model, adapter_names=["second", "default"])
        torch.testing.assert_close(mixed[0], alone[1][0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mixed[1], alone[0][1], rtol=1e-3, atol=1e-3)

    def test_deleting(self, load: Load) -> None:
        model = get_outlier_model(load())
        model.add_adapter("second", OutlierLoraConfig(train_weight_scales=True))
        shake(model, "second")
        model.delete_adapter("second")
        assert not [name for name, _ in model.named_parameters() if "second" in name]


class TestPlainLora:
    def test_it_trains_beside_the_quantized_weight(self, load: Load, tmp_path: Path) -> None:
        model = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
        plain = logits(model)
        model(PROBE, labels=PROBE).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        shake(model)
        assert not torch.allclose(logits(model), plain)
        expected = logits(model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(load(), tmp_path)), expected)

    def test_it_adds_its_product(self, load: Load) -> None:
        model = get_peft_model(load(), LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"]))
        shake(model)
        layer = next(module for module in model.modules() if isinstance(module, QuadLoraLayer))
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T
            torch.testing.assert_close(layer(x), expected)

    def test_four_bit_weights_cannot_take_it_up(self, load: Load) -> None:
        model = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj"]))
        shake(model)
        with pytest.raises(ValueError, match="changes more than the outlier weights of q_proj"):
            model.merge_and_unload()

    def test_works_without_outliers(self, load: Load) -> None:
        model = get_peft_model(load(rank=0, per_head=0, down=0), LoraConfig(r=4, target_modules=["q_proj"]))
        model(PROBE, labels=PROBE).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_stock_models_are_left_alone(self, make_toy: Callable[..., PreTrainedModel]) -> None:
        model = get_peft_model(make_toy(), LoraConfig(r=4, target_modules="all-linear"))
        assert not any(isinstance(module, QuadLoraLayer) for module in model.modules())


class TestBadInput:
    def test_no_quad_checkpoint(self, make_toy: Callable[..., PreTrainedModel]) -> None:
        with pytest.raises(ValueError, match="has no QUAD layers"):
            get_outlier_model(make_toy())
        with pytest.raises(ValueError, match="has no QUAD layers"):
            get_peft_model(make_toy(), OutlierLoraConfig(target_modules=["q_proj"], r=8))

    def test_rank_zero(self, load: Load) -> None:
        with pytest.raises(ValueError, match="no outlier weights to train"):
            get_outlier_model(load(rank=0, per_head=0, down=0))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"r": 5}, r"r \(5\) must be the model's rank"),
            ({"r": -1}, "must be 0"),
            ({"target_modules": ["q_proj", "lm_head"]}, "lm_head: no outlier weights"),
            ({"target_modules": "all-linear"}, "is a list of roles"),
            ({"lora_dropout": 0.1}, "has no lora_dropout"),
            ({"use_dora": True}, "has no use_dora"),
            ({"init_lora_weights": "pissa"}, "has no init_lora_weights"),
        ],
    )
    def test_config(self, load: Load, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            get_outlier_model(load(), OutlierLoraConfig(**arguments))

    def test_lora_inside_of_a_layer(self, load: Load) -> None:
        with pytest.raises(ValueError, match="name the layers themselves"):
            get_peft_model(load(), LoraConfig(target_modules="all-linear"))

    def test_scales_in_a_mixed_batch(self, load: Load) -> None:
        model = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=True)).eval()
        with pytest.raises(ValueError, match="changes weight scales"):
            logits(model, adapter_names=["default", "__base__"])

    def test_the_config_given_is_not_changed(self, load: Load) -> None:
        config = OutlierLoraConfig()
        get_outlier_model(load(), config)
        assert config.r == 0
        assert config.base_fingerprint is None
        assert config.target_modules is None
