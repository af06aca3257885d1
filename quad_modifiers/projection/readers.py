"""What the writers of a block do with the coordinates that they read, from their weights alone."""

from collections.abc import Iterator

import torch

from quad_modifiers.model.decoder import PlacedGroup
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.on_disk import let_go


def values_read(group: PlacedGroup, geometry: ModelGeometry) -> torch.Tensor:
    """Returns second moments of the columns that read each head of values, `[kv_heads, head_dim, head_dim]`, float64.

    Args:
        group: a group that reads values, before any projection; all query heads of a head count together.
        geometry: heads of the model.
    """
    moments = []
    for weight in _weights(group):
        columns = weight.unflatten(1, (geometry.kv_heads, -1, geometry.head_dim))
        rows = columns.movedim(1, 0).flatten(1, 2)  # [kv_heads, out * query heads, head_dim]
        moments.append(rows.mT @ rows)
    return torch.stack(moments).sum(0)


def channels_read(group: PlacedGroup) -> torch.Tensor:
    """Returns the energy of the column that reads each channel, `[channels]`, float64."""
    return torch.stack([weight.square().sum(0) for weight in _weights(group)]).sum(0)


def _weights(group: PlacedGroup) -> Iterator[torch.Tensor]:
    for linear in group.linears:
        weight = linear.module.residual.weight.detach()
        yield weight.double()
        let_go(weight)
