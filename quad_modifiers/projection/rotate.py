"""Folds a rotation of residual coordinates into a projected model, without changing its function.

Behind a projection every norm that feeds linears has a weight of ones, so that a rotation of the stream goes through
it: writers and embedding are multiplied from one side, readers and head from the other. Outlier coordinates stay what
they are. Products are computed in float64 and cast back once.
"""

from collections.abc import Iterator

import torch
from quad_kernels import split_input
from torch import nn

from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.architecture import Space
from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.nn.transformed_norm import TransformedNorm
from quad_modifiers.on_disk import rest
from quad_modifiers.projection.parameters import by_rows, set_parameter
from quad_modifiers.reporting import layer_progress


@torch.no_grad()
def rotate_residual(decoder: Decoder, rotation: torch.Tensor, heads: dict[str, torch.Tensor]) -> None:
    """Rotates the residual coordinates of the stream, and those of the value heads, in place.

    Args:
        decoder: a projected model whose linears are not quantized and have no terms.
        rotation: R of the stream, `[n, n]`, float64, orthogonal; n residual coordinates.
        heads: R of the values of each key-value head, `[kv_heads, m, m]`, float64, by the path of the attention
            module; m residual coordinates of a head.
    """
    turn = _Turn(rotation)
    for block in layer_progress(decoder.blocks, "rotating"):
        for group in block.groups:
            _rotate_group(group, turn, heads, decoder.geometry)
        rest(block.module)
    _rotate_ends(decoder, turn)
    for end in (decoder.embedding, decoder.head):
        rest(end)


class _Turn:
    """A rotation of the last coordinates; those before it stay."""

    def __init__(self, rotation: torch.Tensor) -> None:
        self.rotation = rotation

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight of a reader, or a table of the stream's vectors, `[..., width]`: W R."""
        wide = weight.detach().double()
        kept = wide.shape[-1] - len(self.rotation)
        return torch.cat([wide[..., :kept], wide[..., kept:] @ self.rotation.to(wide.device)], dim=-1)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight of a writer, `[width, n]`, or its bias, `[width]`: R^T W."""
        return self.columns(weight.movedim(0, -1)).movedim(-1, 0)


def _rotate_group(group: PlacedGroup, turn: _Turn, heads: dict[str, torch.Tensor], geometry: ModelGeometry) -> None:
    rotations = heads.get(group.path)
    for linear in group.linears:
        module = linear.module
        if not group.group.quantized:
            set_parameter(module, "weight", turn.columns(module.weight))
            continue
        if group.group.reads == "stream":
            set_parameter(module.residual, "weight", turn.columns(module.residual.weight))
        elif rotations is not None:
            _rotate_reader_of_values(module, rotations, geometry.head_dim)
        for owner, name in _weights(module):
            tensor = getattr(owner, name)
            if group.group.writes_stream:
                set_parameter(owner, name, turn.rows(tensor))
            elif rotations is not None and "values" in linear.member.produces:
                set_parameter(owner, name, _new_values(tensor, linear.member.produces, rotations, geometry.sizes()))


def _weights(linear: QuadLinear) -> Iterator[tuple[nn.Module, str]]:
    """Yields what has a row for each output channel."""
    yield linear.residual, "weight"
    if linear.outlier is not None:
        yield linear.outlier, "weight"
    if linear.bias is not None:
        yield linear, "bias"


def _new_values(
    tensor: torch.Tensor, spaces: tuple[Space, ...], rotations: torch.Tensor, sizes: dict[Space, int]
) -> torch.Tensor:
    """Rows that make values in their new basis, the others as they are; `tensor` is `[out, n]` or `[out]`."""
    parts = list(tensor.detach().double().split([sizes[space] for space in spaces]))
    index = spaces.index("values")
    heads = parts[index].unflatten(0, (len(rotations), -1))
    parts[index] = torch.cat([_Turn(rotation).rows(rows) for rotation, rows in zip(rotations, heads, strict=True)])
    return torch.cat(parts)


def _rotate_reader_of_values(linear: QuadLinear, rotations: torch.Tensor, head_dim: int) -> None:
    """Multiplies the columns that read values by the rotation of their head, behind what the input's split does."""
    unsplit = unsplit_residual(linear.residual.weight.detach().double(), linear.split)
    columns = unsplit.unflatten(1, (len(rotations), -1, head_dim))
    turned = [_Turn(rotation).columns(columns[:, head]) for head, rotation in enumerate(rotations)]
    _, residual = split_input(torch.stack(turned, dim=1).flatten(1), linear.split)
    set_parameter(linear.residual, "weight", residual)


def _rotate_ends(decoder: Decoder, turn: _Turn) -> None:
    embedding, head, norm = decoder.embedding, decoder.head, decoder.final_norm
    tied = decoder.is_tied
    set_parameter(embedding, "weight", by_rows(embedding.weight, turn.columns))
    if isinstance(norm, TransformedNorm):  # the head reads the embedding's table behind M: R^T M R
        set_parameter(norm, "head_transform", turn.rows(turn.columns(norm.head_transform)))
    if tied:
        head.weight = embedding.weight
    else:
        set_parameter(head, "weight", by_rows(head.weight, turn.columns))
