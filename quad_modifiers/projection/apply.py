"""Rewrites a model into another basis without changing its function.

All products are computed in float64 and cast back once. With c = sqrt((d + r) / d) (1 in the square basis) the stream
becomes c x Q, so that a stock RMSNorm over d + r coordinates, with the original eps and a weight of ones, returns
c x Q / rms(x): writers are multiplied by c, readers divided by it. docs/concepts/projection.md has the derivation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from quad_kernels import InputSplit, split_input

from quad_modifiers.model.architecture import Space
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.nn.transformed_norm import add_head_transform
from quad_modifiers.on_disk import let_go, rest
from quad_modifiers.projection.parameters import by_rows, set_parameter
from quad_modifiers.projection.plan import Projection, ResidualBasis
from quad_modifiers.ranks import ranks
from quad_modifiers.reporting import layer_progress


@torch.no_grad()
def apply_projection(decoder: Decoder, projection: Projection, keep_tied: bool = False) -> None:
    """Rewrites every weight of the model in place; the config says the new width afterwards.

    Args:
        decoder: the model, its linears wrapped in `QuadLinear` pass-throughs.
        projection: the plan.
        keep_tied: True to let a head that shares the embedding's tensor go on sharing it (`nn/transformed_norm.py`).

    Raises:
        ValueError: naming a linear that has a term, which belongs to the old basis, or a tensor that the model's dtype
            cannot hold in the new one.
    """
    _refuse_terms(decoder)
    geometry, config = decoder.geometry, decoder.model.config  # the sizes of before are read before they change
    _project_ends(decoder, projection.residual, keep_tied and decoder.is_tied)
    for end in (decoder.embedding, decoder.head):
        rest(end)
    projected = ranks().in_turn(decoder.blocks, lambda block: _project_block(block, projection, geometry.sizes()))
    for block in layer_progress(decoder.blocks, "projecting"):
        _take_weights(block, projection, next(projected))
        rest(block.module)
    _check_representable(decoder)
    config.hidden_size = projection.residual.width
    config.head_dim = geometry.head_dim


def _check_representable(decoder: Decoder) -> None:
    for name, parameter in decoder.model.named_parameters():
        # Scales that a stock quantizer has allocated are not set yet.
        if name.endswith((".weight", ".bias", ".head_transform")) and not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} does not fit {parameter.dtype} after the projection; load the model in bfloat16 or float32"
            )
        let_go(parameter)


def _refuse_terms(decoder: Decoder) -> None:
    for linear in decoder.linears():
        for term in linear.module.terms():
            raise ValueError(
                f"{linear.name} has the term {term.kind!r}, which was made for the basis that a projection changes; "
                "put the projection before what adds terms"
            )


def _project_ends(decoder: Decoder, basis: ResidualBasis, shared: bool) -> None:
    """Rewrites embedding, final norm and head; the config says whether the two read one `shared` table."""
    embedding, head, norm = decoder.embedding, decoder.head, decoder.final_norm
    if shared:
        add_head_transform(norm, basis.between_ends(norm.weight))
    else:
        set_parameter(head, "weight", by_rows(head.weight, lambda rows: basis.read(rows, norm.weight)))
    set_parameter(embedding, "weight", by_rows(embedding.weight, lambda rows: basis.write(rows.T).T))
    if shared:
        head.weight = embedding.weight
    embedding.embedding_dim = head.in_features = basis.width
    set_parameter(norm, "weight", torch.ones(basis.width))
    decoder.model.config.tie_word_embeddings = shared


class _Weights(NamedTuple):
    """What a linear computes with; a plain one has all of it in `residual`."""

    residual: torch.Tensor
    outlier: torch.Tensor | None
    bias: torch.Tensor | None


def _project_block(block: Block, projection: Projection, sizes: dict[Space, int]) -> list[_Weights]:
    """Rewrites the linears of a block; returns what they hold then, in order."""
    held = []
    for group, linear in _linears(block):
        if group.group.reads == "stream":
            new = _projected_reader(group, linear, projection, sizes)
        else:
            new = _projected_writer(group, linear, projection)
        held.append(_set_weights(group, linear, projection, new))
    return held


def _take_weights(block: Block, projection: Projection, weights: list[_Weights]) -> None:
    """Gives a block what the rank that rewrote its linears made of them; on that rank they have it already."""
    for (group, linear), new in zip(_linears(block), weights, strict=True):
        _set_weights(group, linear, projection, new)
    for norm in block.norms():  # after every group that reads it
        set_parameter(norm, "weight", torch.ones(projection.residual.width))


def _linears(block: Block) -> Iterator[tuple[PlacedGroup, PlacedLinear]]:
    return ((group, linear) for group in block.groups for linear in group.linears)


def _set_weights(group: PlacedGroup, linear: PlacedLinear, projection: Projection, new: _Weights) -> _Weights:
    """Returns the weights as the linear holds them, in its own dtype."""
    module = linear.module
    if not group.group.quantized:
        set_parameter(module, "weight", new.residual)
        module.in_features = projection.residual.width
        return _Weights(module.weight, None, None)
    module.set_weights(projection.split(group), *new)
    return _Weights(module.residual.weight, module.outlier_weight, module.bias)


def _projected_reader(
    group: PlacedGroup, linear: PlacedLinear, projection: Projection, sizes: dict[Space, int]
) -> _Weights:
    basis, module, norm = projection.residual, linear.module, group.norm
    assert norm is not None
    if not group.group.quantized:
        return _Weights(basis.read(module.weight, norm.weight), None, None)
    weight, bias = basis.read(module.residual.weight, norm.weight), module.bias
    weight = _new_rows(weight, linear, group.path, projection, sizes)
    if bias is not None:
        bias = _new_rows(bias.detach().double().unsqueeze(1), linear, group.path, projection, sizes).squeeze(1)
    return _divided(projection.split(group), weight, bias)


def _new_rows(
    tensor: torch.Tensor, linear: PlacedLinear, path: str, projection: Projection, sizes: dict[Space, int]
) -> torch.Tensor:
    """Output channels `[out, n]` in the new basis: values head by head, channels in their new order and scale."""
    spaces = linear.member.produces
    if not {"values", "channels"} & set(spaces):
        return tensor

    def changed() -> Iterator[torch.Tensor]:
        start = 0
        for place, space in enumerate(spaces, start=1):
            size = len(projection.orders[path]) if space == "channels" else sizes[space]
            rows = tensor[start : start + size]
            start += size
            if space == "values":
                rows = _change_heads_out(rows, projection.heads[path])
            if space == "channels":
                if linear.member.multiplies and place == len(spaces) and path in projection.factors:
                    rows = rows * projection.factors[path].to(rows.device).unsqueeze(1)
                rows = rows[projection.orders[path].to(rows.device)]
            yield rows

    return torch.cat(list(changed()))


def _projected_writer(group: PlacedGroup, linear: PlacedLinear, projection: Projection) -> _Weights:
    basis, module = projection.residual, linear.module
    weight = basis.write(module.residual.weight)
    if group.group.reads == "values":
        weight = _change_heads_in(weight, projection.inverses.get(group.path, projection.heads[group.path]))
    else:
        if group.path in projection.factors:
            weight = weight / projection.factors[group.path].to(weight.device)
        weight = weight[:, projection.orders[group.path].to(weight.device)]
    bias = None if module.bias is None else basis.write(module.bias)
    return _divided(projection.split(group), weight, bias)


def _change_heads_out(weight: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Rows that make values: each key-value head's values v become v B."""
    return (heads.to(weight.device).transpose(1, 2) @ weight.unflatten(0, (heads.shape[0], -1))).flatten(0, 1)


def _change_heads_in(weight: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Columns that read values: each query head reads v B, so W becomes W B^-T, `heads` being B^-T."""
    kv_heads, head_dim, _ = heads.shape
    columns = weight.unflatten(1, (kv_heads, -1, head_dim))
    return torch.einsum("okgd,kde->okge", columns, heads.to(weight.device)).flatten(1)


def _divided(split: InputSplit, weight: torch.Tensor, bias: torch.Tensor | None) -> _Weights:
    """Divides a weight on the unsplit input between the outlier and the residual linear."""
    # split is orthogonal on its range: outlier columns are picked, the residual keeps zeros and is rotated.
    outlier, residual = split_input(weight, split)
    return _Weights(residual, outlier, bias)
