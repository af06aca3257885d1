"""Pieces of a run that ranks share: each gets what one process makes of them, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quad_kernels import InputSplit, IntegerGrid
from torch import nn

from quad_modifiers.journal import digest_of
from quad_modifiers.modifiers.base import prepared_decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.passes.statistics import collect_statistics
from quad_modifiers.projection.apply import apply_projection
from quad_modifiers.projection.plan import ProjectionSettings, plan_projection
from quad_modifiers.quantization.group import InputMoments, WeightQuantization, quantize_group
from quad_modifiers.ranks import joined

pytest.importorskip("llmcompressor")
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

WIDTH, RANK = 48, 8
ROWS = (400, 300)  # as many as make a piece for each of eight ranks


def quantized_group(error_correction: Any) -> Any:
    """Digest of the linears of a group and of their quantized weights, and the report."""
    generator = torch.Generator().manual_seed(0)
    split, linears = InputSplit(WIDTH, RANK), []
    for rows in ROWS:
        linear = QuadLinear(nn.Linear(split.width, rows, bias=False), "part")
        weight = torch.randn(rows, split.width, generator=generator)
        linear.set_weights(split, weight[:, RANK:], weight[:, :RANK], None)
        linears.append(linear)
    moments = InputMoments(linears[0], bool(error_correction), halves=error_correction == "auto")
    x, noise = torch.randn(2, 500, WIDTH, generator=generator)
    moments.add(x, x + 0.1 * noise if error_correction else None)
    settings = WeightQuantization(IntegerGrid(4), sweeps=2, error_correction=error_correction)
    weights, report = quantize_group(linears, moments.sums(), settings, torch.float32, "x")
    tensors = [(name, tensor) for linear in linears for name, tensor in linear.named_parameters()]
    tensors += [(name, getattr(weight, name)) for weight in weights for name in ("integers", "scale")]
    return digest_of(tensors), report


@pytest.mark.parametrize(("count", "error_correction"), [(2, 0.4), (3, "auto"), (8, 0.4), (2, 0.0)])
def test_a_group_is_quantized_alike(count: int, error_correction: Any, in_ranks, one_thread) -> None:
    wanted = quantized_group(error_correction)

    def work(rank: int) -> Any:
        with joined():
            return quantized_group(error_correction)

    assert in_ranks(count, work) == [wanted] * count


@pytest.mark.parametrize(("model_type", "count"), [("seed_oss", 2), ("phi3", 3)])  # with biases; q, k and v in one
def test_a_projection_is_alike(model_type: str, count: int, make_toy, in_ranks, one_thread) -> None:
    settings = ProjectionSettings(rank=8, values_rank=2, channels_rank=8)
    windows = torch.randint(3, 320, (4, 64), generator=torch.Generator().manual_seed(4))
    statistics = collect_statistics(prepared_decoder(make_toy(model_type)), [{"input_ids": windows}])

    def projected() -> str:
        decoder = prepared_decoder(make_toy(model_type))
        apply_projection(decoder, plan_projection(decoder, settings, statistics))
        return digest_of(decoder.model.named_parameters())

    def work(rank: int) -> Any:
        with joined():
            return projected()

    assert in_ranks(count, work) == [projected()] * count
