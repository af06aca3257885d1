"""A mixture of experts as data: experts are repeated groups, the router reads the stream and is not quantized."""

import logging
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from quad_kernels import IntegerGrid
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from quad_modifiers.checkpoint.dequantize import dequantize_model
from quad_modifiers.model.architecture import Architecture, Group, Member, dense_block
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.passes.statistics import collect_statistics
from quad_modifiers.passes.weight_pass import quantize_blocks
from quad_modifiers.projection.apply import apply_projection
from quad_modifiers.projection.plan import ProjectionSettings, plan_projection
from quad_modifiers.quantization.group import WeightQuantization

NORM = "post_attention_layernorm"
UP = (Member("gate_proj", ("channels",)), Member("up_proj", ("channels",), multiplies=True))
BLOCK = (
    *dense_block()[:2],
    Group("router", "mlp", (Member("router", ("other",)),), "stream", NORM, quantized=False),
    Group("gate_up", "mlp.experts.*", UP, "stream", NORM),
    Group("down", "mlp.experts.*", (Member("down_proj", ("stream",)),), "channels"),
)
EXPERTS = Architecture("experts", BLOCK, runner="hooked")
KINDS = ("qkv", "o", "gate_up", "down")


class Experts(nn.Module):
    """Each token goes to the expert that the router likes best; the last one gets none."""

    def __init__(self, config) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        chosen = self.router(flat)[:, :3].argmax(-1)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                out[chosen == index] = expert(flat[chosen == index])
        return out.view(x.shape)


@pytest.fixture
def decoder(make_toy) -> Decoder:
    model = make_toy("llama")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Experts(model.config).requires_grad_(False)
    decoder = Decoder(model, EXPERTS)
    decoder.check_linears()
    for linear in decoder.linears():
        linear.replace(QuadLinear(linear.module, linear.role))
        linear.module.take_bias()
    return decoder


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    return decoder.model(ids(9)).logits


def scores(decoder: Decoder) -> torch.Tensor:
    """What the routers give every token, which their choice does not show in full."""
    found = []
    routers = [block.module.mlp.router for block in decoder.blocks]
    hooks = [router.register_forward_hook(lambda *seen: found.append(seen[-1])) for router in routers]
    logits(decoder)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize("balanced", [False, True], ids=["", "balanced"])
def test_a_projection_keeps_the_function_and_the_routes(balanced: bool, decoder: Decoder) -> None:
    wanted = logits(decoder)
    settings = ProjectionSettings(rank=8, values_rank=2, channels_rank=8, balanced=balanced)
    statistics = collect_statistics(decoder, [{"input_ids": ids(seed)} for seed in (1, 2)])
    plan = plan_projection(decoder, settings, statistics)
    assert sum("experts" in path for path in plan.orders) == 2 * 4
    seen = set(statistics.channels)  # no token was sent to some experts, the last among them
    assert 0 < len(seen) < 2 * 4
    assert set(plan.factors) == (seen if balanced else set())
    apply_projection(decoder, plan)
    assert decoder.blocks[0].module.mlp.router.in_features == 72
    torch.testing.assert_close(logits(decoder), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [7, 8], ids=["padded", "heads divide"])
def test_a_dequantized_model_routes_alike(rank: int, decoder: Decoder) -> None:
    """The stock llama config wants a multiple of the 4 heads: with rank 7 the stream is widened from 71 to 72."""
    settings = ProjectionSettings(rank=rank, values_rank=2, channels_rank=8)
    statistics = collect_statistics(decoder, [{"input_ids": ids(seed)} for seed in (1, 2)])
    apply_projection(decoder, plan_projection(decoder, settings, statistics))
    wanted, wanted_scores = logits(decoder), scores(decoder)
    dequantize_model(decoder.model, replace(EXPERTS, model_type="llama"))
    assert decoder.model.config.hidden_size == 72
    assert [block.module.mlp.router.in_features for block in decoder.blocks] == [72, 72]
    assert not any(isinstance(module, QuadLinear) for module in decoder.model.modules())
    torch.testing.assert_close(scores(decoder), wanted_scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(decoder), wanted, rtol=1e-4, atol=1e-4)


def test_every_expert_is_quantized_on_the_tokens_that_it_sees(decoder: Decoder) -> None:
    wanted, done = logits(decoder), []
    settings = WeightQuantization(IntegerGrid(8), error_correction=0.5)

    def install(linear, weight) -> None:
        linear.module.residual = PackedLinear.of(weight, weight.scale.dtype)
        done.append(linear.name)

    batches = [{"input_ids": ids(seed)} for seed in (1, 2)]
    blocks = quantize_blocks(decoder, batches, settings, install, lambda name: False)
    reports = [report for block in blocks for _, report in block]
    assert len(done) == 2 * (4 + 4 * 3)
    unseen = [report.name for report in reports if report.attempts == 0]
    assert sum("experts.3" in name for name in unseen) == 2 * 2, "rounded to nearest: no token was sent there"
    assert not [name for name in unseen if "experts.0" in name or "self_attn" in name]
    assert isinstance(decoder.blocks[0].module.mlp.router, nn.Linear)
    error = float((logits(decoder) - wanted).norm() / wanted.norm())
    print(f"relative error with 8-bit weights {error:.4f}, bound 0.05")
    assert 0 < error < 0.05


@torch.no_grad()
def test_the_table_of_errors_has_a_row_for_each_block(
    decoder: Decoder, make_toy, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("llmcompressor")
    from llmcompressor.core import State

    batches = [{"input_ids": ids(seed)} for seed in (1, 2)]
    copy = Decoder(deepcopy(decoder.model), EXPERTS)
    each = quantize_blocks(copy, batches, WeightQuantization(IntegerGrid(8)), lambda *_: None, lambda name: False)
    found = [[(group.group.name, report.decibels) for group, report in block] for block in each]
    modifier = OutlierSplitGPTQ(bits=8)
    modifier.run(decoder, lambda: batches)
    with caplog.at_level(logging.INFO, logger="quad_modifiers"):
        modifier.on_finalize(State(model=make_toy("llama")))  # of a known architecture: only the log is looked at
    rows = re.findall(r"^model\.layers\.\d +(.*)$", caplog.text, re.MULTILINE)
    worst = [[min(value for name, value in block if name == kind) for kind in KINDS] for block in found]
    assert [[float(cell) for cell in row.split()] for row in rows] == [[round(v, 1) for v in row] for row in worst]
