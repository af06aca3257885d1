"""The tensors of a packed weight: their names, shapes and dtypes, as compressed-tensors lays them out."""

from typing import Any, NamedTuple

import torch
from quad_kernels import FloatGrid, WeightGrid
from quad_kernels.weight import SUB_SCALE_BITS


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


def packed_shapes(out_features: int, in_features: int, grid: WeightGrid, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Returns the tensors of a packed weight by name, such as weight_scale.

    Args:
        out_features: output channels.
        in_features: input width.
        grid: grid of the weight, of 2, 4 or 8 bits; zero points and sub-scales are packed along the output channels.
        dtype: dtype of the scales; those of floating-point numbers have their own.
    """
    if isinstance(grid, FloatGrid):
        return _float_shapes(out_features, in_features, grid)
    per_word, groups = 32 // grid.bits, grid.groups(in_features)
    specs = {
        "weight_packed": TensorSpec((out_features, -(-in_features // per_word)), torch.int32),
        "weight_scale": TensorSpec((out_features, grid.scales(in_features)), dtype),
        "weight_shape": TensorSpec((2,), torch.int64, (out_features, in_features)),
    }
    if not grid.symmetric:
        specs["weight_zero_point"] = TensorSpec((-(-out_features // per_word), groups), torch.int32)
    if grid.sub_scale_bits is not None:
        specs["weight_sub_scale"] = TensorSpec((-(-out_features * SUB_SCALE_BITS // 32), groups), torch.int32)
    return specs


def _float_shapes(out_features: int, in_features: int, grid: FloatGrid) -> dict[str, TensorSpec]:
    """compressed-tensors' nvfp4-pack-quantized and mxfp4-pack-quantized."""
    has_global = grid.number_format == "nvfp4"
    specs = {
        "weight_packed": TensorSpec((out_features, in_features // 2), torch.uint8),
        "weight_scale": TensorSpec(
            (out_features, grid.groups(in_features)), torch.float8_e4m3fn if has_global else torch.uint8
        ),
    }
    if has_global:
        specs["weight_global_scale"] = TensorSpec((1,), torch.float32)
    return specs


def refuse_other_shape(
    module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
) -> None:
    """Hook before a state dict is loaded: refuses the weight of another shape, which words may hide.

    Its message goes to the last of `lists`, where torch collects errors; torch raises them all as one RuntimeError.
    """
    found, wanted = state_dict.get(f"{prefix}weight_shape"), getattr(module, "weight_shape", None)
    if found is None or wanted is None or found.is_meta or wanted.is_meta or torch.equal(found.cpu(), wanted.cpu()):
        return
    lists[-1].append(f"{prefix}weight_shape says {found.tolist()}, but the module is of {wanted.tolist()}.")
