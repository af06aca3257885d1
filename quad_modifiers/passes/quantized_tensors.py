"""What the journal of a run keeps of a linear that was quantized."""

import torch
from quad_kernels import IntegerGrid, QuantizedWeight

from quad_modifiers.model.decoder import PlacedLinear


def keep_weight(linear: PlacedLinear, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors of a linear whose weight was quantized, by names that begin with its own."""
    outlier = linear.module.outlier_weight
    parts = {
        "packed": weight.to_words(),
        "scale": weight.scale,
        "zero_point": weight.zero_point_words(),
        "sub_scale": weight.sub_scale_words(),
        "outlier": outlier,
    }
    return {f"{linear.name}.{part}": value for part, value in parts.items() if value is not None}


def kept_weight(linear: PlacedLinear, tensors: dict[str, torch.Tensor], grid: IntegerGrid) -> QuantizedWeight | None:
    """Puts the outlier weight back in its place and returns the quantized one; None if the linear was left alone."""

    def part(name: str) -> torch.Tensor | None:
        found = tensors.get(f"{linear.name}.{name}")
        return None if found is None else found.to(linear.module.qweight.device)

    packed, scale, outlier = part("packed"), part("scale"), part("outlier")
    if packed is None or scale is None:
        return None
    if outlier is not None:
        linear.module.outlier.weight.copy_(outlier)
    columns = linear.module.split.residual_width
    return QuantizedWeight.from_words(packed, scale, grid.bits, columns, part("zero_point"), part("sub_scale"))
