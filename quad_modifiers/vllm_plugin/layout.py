"""Which rows of which checkpoint tensors one rank's layer holds.

vLLM fuses linears that read the same input, and divides layers among tensor-parallel ranks. Both are about rows of the
weight here: docs/developer/vllm.md says why row-parallel layers are divided by output rows as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from quad_modifiers.checkpoint.format import LinearFormat
from quad_modifiers.nn.branch_term import BranchTerm

ShardId = str | int | None
_POSITIONS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Rows:
    """Rows of one member of a layer.

    Attributes:
        start: first row in the checkpoint's tensor.
        count: number of rows.
        offset: first row in the layer's tensor.
    """

    start: int
    count: int
    offset: int


def member_position(shard_id: ShardId) -> int:
    """Position of a member in its fused layer from vLLM's shard id: "q", "k", "v", a number, or None if not fused."""
    if shard_id is None:
        return 0
    return _POSITIONS[shard_id] if isinstance(shard_id, str) else shard_id


def layer_index(prefix: str) -> int:
    """Returns the number of the decoder block of a layer, by its path in vLLM's model.

    Raises:
        ValueError: if the path has no number, or several.
    """
    numbers = [part for part in prefix.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise ValueError(
            f"{prefix}: the checkpoint gives some blocks other bits, and this path does not say which block it is in; "
            "load it with transformers"
        )
    return int(numbers[0])


def fused_format(linears: dict[str, LinearFormat], roles: Sequence[str], prefix: str) -> LinearFormat:
    """Returns the format that the members of a layer share; its `out_features` is their sum.

    Each member has its own branch, or none: `branch_ranks`.

    `roles` are the members in vLLM's order, such as q_proj, k_proj, v_proj.
    """
    missing = [role for role in roles if role not in linears]
    if missing:
        raise ValueError(
            f"{prefix}: the checkpoint does not describe {', '.join(missing)}; its quantization_config is damaged, or "
            "made for another architecture"
        )
    first = linears[roles[0]]
    for role in roles[1:]:
        same = linears[role].model_copy(update={"out_features": first.out_features, "terms": first.terms})
        differing = [field for field in type(first).model_fields if getattr(first, field) != getattr(same, field)]
        if differing:
            field = differing[0]
            raise ValueError(
                f"{prefix}: vLLM computes {', '.join(roles)} as one layer with one input, so they must be quantized "
                f"alike, but {field} is {getattr(first, field)!r} for {roles[0]} and {getattr(same, field)!r} for "
                f"{role}; compress with the same settings for these linears, or load with transformers"
            )
    return first.model_copy(update={"out_features": sum(linears[role].out_features for role in roles)})


def branch_ranks(members: Sequence[LinearFormat]) -> tuple[int, ...]:
    """Returns the ranks of the members' low-rank branches, 0 for a member without one."""
    return tuple(member.terms.get(BranchTerm.kind, {}).get("rank", 0) for member in members)


def column_parallel_rows(
    out_features: Sequence[int], partition_sizes: Sequence[int], rank: int, ranks: int, prefix: str
) -> list[Rows]:
    """Returns the rows of each member that a rank of a column-parallel layer holds.

    A member with fewer heads than ranks is replicated: `ranks * partition / out_features` neighbours hold equal rows.

    `out_features` are the members' output widths in the checkpoint, `partition_sizes` those on one rank, from vLLM.
    """
    rows, offset = [], 0
    for member, (total, count) in enumerate(zip(out_features, partition_sizes, strict=True)):
        if count > total or ranks * count < total or ranks * count % total:
            raise ValueError(
                f"{prefix}: config.json asks for {ranks * count} output channels in part {member}, its "
                f"quantization_config describes {total}; the checkpoint is damaged"
            )
        start = rank // (ranks * count // total) * count
        rows.append(Rows(start, count, offset))
        offset += count
    return rows


def stacked_rows(
    out_features: int, whole: Sequence[int], partition_sizes: Sequence[int], rank: int, ranks: int, prefix: str
) -> list[Rows]:
    """Returns the rows of each part of one tensor that a rank of a column-parallel layer holds.

    The checkpoint holds as one what vLLM holds as one, q, k and v or gate and up of the same size.

    `out_features` is the output width in the checkpoint, `whole` are the widths of the parts on all ranks together,
    where key and value heads count as often as they are held, `partition_sizes` those on one rank; both from vLLM.
    """
    first, *others = whole
    each, rest = divmod(out_features - first, len(others))
    if each <= 0 or rest:
        raise ValueError(
            f"{prefix}: config.json asks for {first} output channels in the first of {len(whole)} parts, its "
            f"quantization_config describes {out_features} in all; the checkpoint is damaged"
        )
    parts = [first] + [each] * len(others)
    rows = column_parallel_rows(parts, partition_sizes, rank, ranks, prefix)
    before = accumulate(parts, initial=0)
    return [replace(row, start=row.start + start) for row, start in zip(rows, before, strict=False)]


def row_parallel_rows(out_features: int, rank: int, ranks: int) -> Rows:
    """Returns the rows that a rank of a row-parallel layer computes, as even as possible."""
    start, end = rank * out_features // ranks, (rank + 1) * out_features // ranks
    return Rows(start, end - start, 0)
