"""Adapters that change integers: what they compute, save and merge, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("llmcompressor")

from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft import OutlierLoraConfig, QuadLoraLayer, get_outlier_model
from quad_peft.integer_change import fix_integers, integer_changes, scatter_changes

from .test_adapter import PROBE, logits, shake

Load = Callable[..., PreTrainedModel]
GRIDS = {
    "2 bits": {"bits": 2},
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "groups": {"bits": 4, "group_size": 8},
    "zero points": {"bits": 4, "symmetric": False},
}


@pytest.fixture(scope="module")
def grid_folder(make_toy, compress, tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("grid") / "out"
            inputs = [] if name == "groups" else [DynamicActQuant(u_type_bits=4, d_type_bits=8)]
            projection = SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4)
            compress(make_toy(), projection, *inputs, OutlierSplitGPTQ(**GRIDS[name]), output_dir=made[name])
        return made[name]

    return folder


def config(**fields: object) -> OutlierLoraConfig:
    return OutlierLoraConfig(train_weight_scales=True, train_weights=True, **fields)


def stir(model: nn.Module, size: float = 1.0) -> None:
    """Gives the changes of integers random values, most of which move an integer."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for change in integer_changes(model):
            change.copy_(size * torch.randn(change.shape, generator=generator))


def integers(model: nn.Module) -> list[torch.Tensor]:
    return [m.residual.quantized_weight().integers for m in model.modules() if isinstance(m, QuadLinear)]


@pytest.mark.parametrize("grid", GRIDS)
class TestGrids:
    def test_a_new_adapter_changes_nothing(self, grid: str, grid_folder) -> None:
        model = AutoModelForCausalLM.from_pretrained(grid_folder(grid))
        before = logits(model)
        assert torch.equal(logits(get_outlier_model(model, config())), before)

    def test_merged_saved_and_loaded_it_computes_the_same(self, grid: str, grid_folder, tmp_path: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(grid_folder(grid))
        plain, before = logits(base), [each.clone() for each in integers(base)]
        model = get_outlier_model(base, config())
        shake(model)
        stir(model)
        expected = logits(model)
        assert not torch.equal(expected, plain)
        model.merge_and_unload().save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), expected)
        files = [load_file(folder / "model.safetensors") for folder in (grid_folder(grid), tmp_path)]
        assert {n: (t.shape, t.dtype) for n, t in files[0].items()} == {
            n: (t.shape, t.dtype) for n, t in files[1].items()
        }
        bits = GRIDS[grid]["bits"]
        for old, new in zip(before, integers(again), strict=True):
            assert not torch.equal(old, new)
            assert int(new.min()) >= -(2 ** (bits - 1))
            assert int(new.max()) <= 2 ** (bits - 1) - 1

    def test_steps_lower_the_loss(self, grid: str, grid_folder) -> None:
        model = get_outlier_model(AutoModelForCausalLM.from_pretrained(grid_folder(grid)), config())
        changes = integer_changes(model)
        optimizer = torch.optim.AdamW(changes, lr=0.15, weight_decay=0.0, fused=True)
        losses = []
        for _ in range(12):
            loss = model(PROBE, labels=PROBE).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.1


class TestScattering:
    def test_it_moves_no_integer_and_spreads_evenly(self, load: Load) -> None:
        model = get_outlier_model(load(), config())
        before = logits(model)
        scatter_changes(model, seed=1)
        assert torch.equal(logits(model), before)
        spread = torch.cat([change.detach().flatten() for change in integer_changes(model)])
        assert abs(float(spread.mean())) < 0.01
        torch.testing.assert_close(spread.std(), torch.tensor(12**-0.5), rtol=0.02, atol=0.0)
        for step in (0.05, 0.2):  # a step moves its own share of the integers
            moved = float((spread + step).round().ne(0).float().mean())
            assert moved == pytest.approx(step, rel=0.1)

    def test_trained_changes_are_left_alone(self, load: Load) -> None:
        model = get_outlier_model(load(), config())
        stir(model)
        before = [change.detach().clone() for change in integer_changes(model)]
        scatter_changes(model)
        assert all(map(torch.equal, before, integer_changes(model)))

    def test_the_same_seed_gives_the_same(self, load: Load) -> None:
        made = []
        for seed in (0, 0, 1):
            model = get_outlier_model(load(), config())
            scatter_changes(model, seed)
            made.append(torch.cat([change.detach().flatten() for change in integer_changes(model)]))
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])


class TestFolder:
    def test_fixed_integers_are_saved_in_a_byte_each(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load(), config())
        shake(model)
        stir(model)
        expected = logits(model)
        moved = fix_integers(model)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path)
        saved = {n: t for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "integer_change" in n}
        assert {tensor.dtype for tensor in saved.values()} == {torch.int8}
        assert moved == sum(int(tensor.count_nonzero()) for tensor in saved.values()) > 0
        for low_memory in (False, True):
            again = PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=low_memory)
            assert torch.equal(logits(again), expected)

    def test_changes_between_integers_are_saved_as_they_are(self, load: Load, tmp_path: Path) -> None:
        model = get_outlier_model(load(), config())
        stir(model, 0.3)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load(), tmp_path, is_trainable=True)
        for one, two in zip(integer_changes(model), integer_changes(again), strict=True):
            assert torch.equal(one, two)
            assert two.requires_grad

    def test_copies(self, load: Load) -> None:
        model = get_outlier_model(load(), config())
        stir(model)
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)


class TestLayer:
    def test_unmerged_it_is_as_before(self, load: Load) -> None:
        model = get_outlier_model(load(torch.bfloat16), config())
        plain = logits(model)
        shake(model)
        stir(model)
        expected = logits(model)
        model.merge_adapter()
        assert torch.equal(logits(model), expected)
        model.cpu()
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)

    def test_a_step_of_an_optimizer_that_tells_nobody_is_seen(self, load: Load) -> None:
        model = get_outlier_model(load(), config())
        before = logits(model)
        optimizer = torch.optim.AdamW(integer_changes(model), lr=0.8, weight_decay=0.0, fused=True)
        model(PROBE, labels=PROBE).loss.backward()
        optimizer.step()
        after = logits(model)
        assert not torch.equal(after, before)
        model(PROBE, labels=PROBE).loss.backward()
        optimizer.step()
        assert not torch.equal(logits(model), after)

    def test_a_wider_model_computes_what_the_stored_one_will(self, load: Load, tmp_path: Path) -> None:
        """Outlier weights and scales are rounded as the checkpoint will hold them, and still receive gradients."""
        load(torch.bfloat16).save_pretrained(tmp_path / "base")
        model = get_outlier_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), config()
        )
        for module in model.modules():
            if isinstance(module, QuadLoraLayer):
                module.stored_dtype = torch.bfloat16
        shake(model)
        stir(model)
        expected = logits(model)
        model(PROBE, labels=PROBE).loss.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert all(bool(parameter.grad.any()) for parameter in trained)
        model.save_pretrained(tmp_path / "adapter")
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert stored.dtype == torch.bfloat16
        merged = PeftModel.from_pretrained(stored, tmp_path / "adapter").merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert torch.equal(logits(again), expected)

    def test_rows_of_a_batch_cannot_have_other_integers(self, load: Load) -> None:
        model = get_outlier_model(load(), config()).eval()
        with pytest.raises(ValueError, match="changes weight scales and cannot share a batch"):
            model(PROBE, adapter_names=["default"] * 2)
        model = get_outlier_model(load(), OutlierLoraConfig(train_weights=True)).eval()
        with pytest.raises(ValueError, match="changes integers and cannot share a batch"):
            model(PROBE, adapter_names=["default"] * 2)

    def test_adapters_with_integers_are_not_combined(self, load: Load) -> None:
        model = get_outlier_model(load(), config(), adapter_name="first")
        with pytest.raises(ValueError, match="'first' changes the integers of the weights, which cannot be combined"):
            model.add_weighted_adapter(["first"], [0.5], "mixed", combination_type="linear")

    def test_a_layer_without_a_quantized_weight(self, make_toy, compress) -> None:
        projection = SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4)
        model = compress(make_toy(), projection, DynamicActQuant())
        with pytest.raises(ValueError, match="has no quantized weight, so it has no integers to train"):
            get_outlier_model(model, OutlierLoraConfig(train_weights=True))
