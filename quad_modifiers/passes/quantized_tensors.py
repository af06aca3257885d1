"""What the journal of a run keeps of a linear that was quantized."""

import torch
from quad_kernels import FloatGrid, QuantizedWeight, WeightGrid

from quad_modifiers.model.decoder import PlacedLinear
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import OUTLIER_GRID


def keep_weight(linear: PlacedLinear, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors of a linear whose weight was quantized, by names that begin with its own."""
    packed_outlier = linear.module.packed_outlier
    parts = {
        "packed": weight.to_words(),
        "scale": weight.scale,
        "zero_point": weight.zero_point_words(),
        "sub_scale": weight.sub_scale_words(),
        "outlier": linear.module.outlier_weight,
    }
    if packed_outlier is not None:
        kept = packed_outlier.quantized_weight()
        parts |= {"outlier_packed": kept.to_words(), "outlier_scale": kept.scale}
    return {f"{linear.name}.{part}": value for part, value in parts.items() if value is not None}


def kept_weight(linear: PlacedLinear, tensors: dict[str, torch.Tensor], grid: WeightGrid) -> QuantizedWeight | None:
    """Puts the outlier weight back in its place and returns the quantized one; None if the linear was left alone."""

    def part(name: str) -> torch.Tensor | None:
        found = tensors.get(f"{linear.name}.{name}")
        return None if found is None else found.to(linear.module.qweight.device)

    module, packed, scale = linear.module, part("packed"), part("scale")
    if packed is None or scale is None:
        return None
    outlier, outlier_packed, outlier_scale = part("outlier"), part("outlier_packed"), part("outlier_scale")
    if outlier is not None:
        module.outlier_weight.copy_(outlier)
    if outlier_packed is not None and outlier_scale is not None:
        rounded = QuantizedWeight.from_words(outlier_packed, outlier_scale, OUTLIER_GRID.bits, module.split.rank)
        module.outlier = PackedLinear.of(rounded, outlier_scale.dtype, module.outlier_quantization)
    if isinstance(grid, FloatGrid):
        return QuantizedWeight.of_float4(packed, scale, grid.number_format)
    columns = module.split.residual_width
    return QuantizedWeight.from_words(packed, scale, grid.bits, columns, part("zero_point"), part("sub_scale"))
