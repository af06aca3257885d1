"""What the writers of a block do with the coordinates that they read, from their weights alone."""

import torch

from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.on_disk import let_go


def values_read(group: PlacedGroup, geometry: ModelGeometry) -> torch.Tensor:
    """Returns the second moments of the columns that read each head of values, `[kv_heads, head_dim, head_dim]`.

    Args:
        group: a group that reads values, before any projection; all query heads of a head count together.
        geometry: heads of the model.
    """
    total = torch.zeros(())
    for linear in group.linears:
        weight = linear.module.residual.weight.detach()
        columns = weight.double().unflatten(1, (geometry.kv_heads, -1, geometry.head_dim)).permute(1, 0, 2, 3)
        rows = columns.flatten(1, 2)  # [kv_heads, out * query heads, head_dim]
        total = total.to(rows) + rows.mT @ rows
        let_go(weight)
    return total


def channels_read(group: PlacedGroup) -> torch.Tensor:
    """Returns the energy of the column that reads each channel, `[channels]`, float64."""
    total = torch.zeros(())
    for linear in group.linears:
        weight = linear.module.residual.weight.detach()
        total = total.to(weight.device) + weight.double().square().sum(0)
        let_go(weight)
    return total


def scalable_channels(decoder: Decoder) -> set[str]:
    """Returns the paths of the MLPs of which a factor of each channel goes through: those with a gate."""
    return {
        linear.name.removesuffix(f".{linear.member.name}") for linear in decoder.linears() if linear.member.multiplies
    }
