"""A projection is a value: one written by hand is applied like one that was planned."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputSplit

from quad_modifiers.linalg import extended_basis, outlier_basis, random_rotation
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.nn.term import LinearTerm
from quad_modifiers.passes.statistics import collect_statistics
from quad_modifiers.projection.apply import apply_projection
from quad_modifiers.projection.plan import Projection, ProjectionSettings, ResidualBasis, plan_projection


def wrapped(model) -> Decoder:
    decoder = Decoder(model, Architecture(model.config.model_type))
    for linear in decoder.linears():
        linear.replace(QuadLinear(linear.module, linear.role))
        linear.module.take_bias()
    return decoder


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(torch.randint(3, 320, (3, 20), generator=torch.Generator().manual_seed(9))).logits


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_projection_written_by_hand_keeps_the_function(model_type, make_toy) -> None:
    model = make_toy(model_type, tie_word_embeddings=True)
    wanted, decoder = logits_of(model), wrapped(model)
    generator = torch.Generator().manual_seed(3)
    paths = {group.path: group.group.reads for group in decoder.groups()}
    outliers, _ = outlier_basis(torch.eye(64, dtype=torch.float64), 4)
    heads = torch.stack([random_rotation(16, "random", generator) for _ in range(2)])
    projection = Projection(
        residual=ResidualBasis(extended_basis(outliers, random_rotation(64, "random", generator)), 4),
        heads={path: heads for path, reads in paths.items() if reads == "values"},
        orders={path: torch.randperm(128, generator=generator) for path, reads in paths.items() if reads == "channels"},
        value_split=InputSplit(64, 2, 16, keep_width=True),
        channel_splits={
            path: InputSplit(128, 5, keep_width=True, hadamard=True)
            for path, reads in paths.items()
            if reads == "channels"
        },
    )
    apply_projection(decoder, projection)
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    assert model.config.hidden_size == 68


def test_a_plan_changes_nothing(make_toy) -> None:
    model = make_toy("llama")
    decoder = wrapped(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": torch.randint(3, 320, (2, 64), generator=torch.Generator().manual_seed(4))}] * 4
    settings = ProjectionSettings(rank=8, values_rank=2, channels_rank=4)
    plan = plan_projection(decoder, settings, collect_statistics(decoder, batches))
    assert plan.origin is not None
    assert plan.origin["rank"] == 8
    assert plan.residual.width == 72
    assert model.config.hidden_size == 64
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("down_proj_rank", [0, 5])
def test_every_mlp_may_have_a_width_of_its_own(down_proj_rank, make_toy) -> None:
    model = make_toy("llama")
    mlp, generator = model.model.layers[1].mlp, torch.Generator().manual_seed(4)
    for name, shape in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        linear.weight = torch.nn.Parameter(torch.randn(shape, generator=generator) / 8)
        setattr(mlp, name, linear)
    wanted = logits_of(model)
    Decoder(model, Architecture("llama")).check_linears()
    decoder, settings = wrapped(model), ProjectionSettings(rank=8, channels_rank=down_proj_rank)
    settings.check(decoder)
    batches = [{"input_ids": torch.randint(3, 320, (2, 64), generator=generator)} for _ in range(4)]
    apply_projection(decoder, plan_projection(decoder, settings, collect_statistics(decoder, batches)))
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)
    assert [block.module.mlp.down_proj.split.width for block in decoder.blocks] == [128, 96]
    with pytest.raises(ValueError, match=r"down_proj_rank \(96\) must be smaller than intermediate_size \(96\)"):
        ProjectionSettings(channels_rank=96).check(Decoder(model, Architecture("llama")))


def test_a_term_of_the_old_basis_is_refused(make_toy) -> None:
    class Nothing(LinearTerm):
        kind = "nothing"

    decoder = wrapped(make_toy("llama"))
    before = decoder.model.model.norm.weight
    next(decoder.linears()).module.add_term(Nothing())
    with pytest.raises(ValueError, match=r"q_proj has the term 'nothing'.*put the projection before what adds terms"):
        apply_projection(decoder, plan_projection(decoder, ProjectionSettings(rank=0), None))
    assert decoder.model.model.norm.weight is before
