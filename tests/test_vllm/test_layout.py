"""Which rows a rank's layer holds, and what cannot be fused."""

from __future__ import annotations

import pytest

from quad_modifiers.checkpoint.format import InputFormat, WeightFormat
from quad_modifiers.vllm_plugin.layout import (
    Rows,
    branch_ranks,
    column_parallel_rows,
    fused_format,
    layer_index,
    member_position,
    row_parallel_rows,
    stacked_rows,
)

QKV = ("q_proj", "k_proj", "v_proj")


def test_members_are_fused(toy_quad) -> None:
    linears = toy_quad().linears
    fused = fused_format(linears, QKV, "qkv_proj")
    assert fused.out_features == 128 + 64 + 64
    assert fused.model_copy(update={"out_features": 128}) == linears["q_proj"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"outliers_per_block": 4}, "outliers_per_block"),
        ({"weight": WeightFormat(bits=8)}, "weight"),
        ({"input": InputFormat(bits=8, clip_ratio=1.0)}, "input"),
        ({"bias": True}, "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_members_that_differ_are_refused(change, field, toy_quad) -> None:
    linears = toy_quad(k_proj=change).linears
    with pytest.raises(ValueError, match=rf"layers.1.qkv_proj.*quantized alike, but {field} is .* for k_proj"):
        fused_format(linears, QKV, "layers.1.qkv_proj")


def test_members_have_branches_of_their_own(toy_quad) -> None:
    branch = {"terms": {"low_rank_branch": {"rank": 3}}}
    linears = toy_quad(q_proj=branch, v_proj={"terms": {"low_rank_branch": {"rank": 5}}}).linears
    assert fused_format(linears, QKV, "qkv_proj").out_features == 256
    assert branch_ranks([linears[role] for role in QKV]) == (3, 0, 5)


def test_the_block_of_a_layer() -> None:
    assert layer_index("model.layers.12.self_attn.qkv_proj") == 12
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.0\.up_proj: .* does not say which block"):
        layer_index("layers.1.mlp.experts.0.up_proj")


def test_undescribed_member_is_named(toy_quad) -> None:
    linears = dict(toy_quad().linears)
    del linears["v_proj"]
    with pytest.raises(ValueError, match="does not describe v_proj"):
        fused_format(linears, QKV, "qkv_proj")


@pytest.mark.parametrize(
    ("rank", "ranks", "partitions", "rows"),
    [
        pytest.param(0, 1, [8, 4, 4], [Rows(0, 8, 0), Rows(0, 4, 8), Rows(0, 4, 12)], id="one rank"),
        pytest.param(1, 2, [4, 2, 2], [Rows(4, 4, 0), Rows(2, 2, 4), Rows(2, 2, 6)], id="second of two"),
        pytest.param(3, 4, [2, 2, 2], [Rows(6, 2, 0), Rows(2, 2, 2), Rows(2, 2, 4)], id="replicated heads"),
    ],
)
def test_column_parallel(rank, ranks, partitions, rows) -> None:
    assert column_parallel_rows([8, 4, 4], partitions, rank, ranks, "qkv_proj") == rows


@pytest.mark.parametrize("partition", [3, 5, 12])
def test_sizes_that_contradict_the_checkpoint_are_refused(partition) -> None:
    with pytest.raises(ValueError, match=rf"gate_up_proj: config.json asks for {2 * partition} .* describes 8"):
        column_parallel_rows([8], [partition], 0, 2, "gate_up_proj")


@pytest.mark.parametrize(("rank", "ranks", "partitions"), [(0, 1, (8, 4, 4)), (1, 2, (4, 2, 2)), (3, 4, (2, 2, 2))])
def test_a_fused_tensor_gives_the_rows_of_its_parts(rank, ranks, partitions) -> None:
    """A tensor of q, k and v in one: each part's rows are those of a tensor of its own, further down."""
    whole = [ranks * count for count in partitions]  # in which a head of keys counts once for each rank that holds it
    rows = stacked_rows(16, whole, partitions, rank, ranks, "qkv_proj")
    apart = column_parallel_rows([8, 4, 4], partitions, rank, ranks, "qkv_proj")
    shifts = [row.start - own.start for row, own in zip(rows, apart, strict=True)]
    assert shifts == [0, 8, 12]
    assert [(row.count, row.offset) for row in rows] == [(own.count, own.offset) for own in apart]


@pytest.mark.parametrize("out_features", [7, 8, 15])
def test_a_fused_tensor_that_contradicts_the_config_is_refused(out_features) -> None:
    with pytest.raises(ValueError, match=r"qkv_proj: config.json asks for 8 .* damaged"):
        stacked_rows(out_features, [8, 4, 4], [8, 4, 4], 0, 1, "qkv_proj")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_row_parallel_ranks_cover_every_row_once(ranks) -> None:
    rows = [row_parallel_rows(10, rank, ranks) for rank in range(ranks)]
    covered = [row for part in rows for row in range(part.start, part.start + part.count)]
    assert covered == list(range(10))
    assert max(part.count for part in rows) - min(part.count for part in rows) <= 1


def test_shard_ids() -> None:
    assert [member_position(shard) for shard in ("q", "k", "v", 0, 1, None)] == [0, 1, 2, 0, 1, 0]
