"""The tensors of a packed weight: their names, shapes and dtypes, as compressed-tensors lays them out."""

from typing import Any, NamedTuple

import torch


class TensorSpec(NamedTuple):
    """What a stored tensor must look like.

    Attributes:
        shape: exact shape.
        dtype: exact dtype of integers; any floating-point dtype may stand for another.
        value: exact content, where the config determines it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: tuple[int, ...] | None = None


def packed_shapes(
    out_features: int, in_features: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Returns the tensors of a packed weight by name, such as weight_scale.

    Args:
        out_features: output channels.
        in_features: input width.
        bits: 2, 4 or 8.
        group_size: input coordinates per scale, None for one scale per output channel.
        symmetric: False for a zero point per scale, packed along the output channels.
        dtype: dtype of the scales.
    """
    per_word = 32 // bits
    groups = 1 if group_size is None else in_features // group_size
    specs = {
        "weight_packed": TensorSpec((out_features, -(-in_features // per_word)), torch.int32),
        "weight_scale": TensorSpec((out_features, groups), dtype),
        "weight_shape": TensorSpec((2,), torch.int64, (out_features, in_features)),
    }
    if not symmetric:
        specs["weight_zero_point"] = TensorSpec((-(-out_features // per_word), groups), torch.int32)
    return specs


def refuse_other_shape(
    module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Hook before a state dict is loaded: refuses the weight of another shape, which words may hide.

    Its message goes to the last of `lists`, where torch collects errors; torch raises them all as one RuntimeError.
    """
    found, wanted = state_dict.get(f"{prefix}weight_shape"), module.weight_shape
    if found is None or found.is_meta or wanted.is_meta or torch.equal(found.cpu(), wanted.cpu()):
        return
    lists[-1].append(f"{prefix}weight_shape says {found.tolist()}, but the module is of {wanted.tolist()}.")
