"""How the input of a linear layer is divided and quantized, as the kernels define it."""

from quad_kernels.formats import InputQuantization, InputSplit

__all__ = ["InputQuantization", "InputSplit"]
