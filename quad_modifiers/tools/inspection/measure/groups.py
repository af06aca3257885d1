"""What is tried on the inputs of linears, and how they are divided."""

from quad_kernels import InputQuantization, InputSplit
from torch import nn

from quad_modifiers.nn.quad_linear import QuadLinear

# The clip ratios of the shipped recipes: a 4-bit grid that clips a little has less error, an 8-bit one is fine enough.
INPUT_GRIDS = {4: InputQuantization(4, clip_ratio=0.86), 8: InputQuantization(8, clip_ratio=1.0)}


def split_of(linear: nn.Module) -> InputSplit:
    """Returns how a linear divides its input; a stock one does not."""
    return linear.split if isinstance(linear, QuadLinear) else InputSplit(linear.in_features)
