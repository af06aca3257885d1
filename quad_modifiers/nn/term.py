"""A term of a linear beside its residual and outlier parts; a plugin brings kinds of its own."""

from typing import Any, ClassVar

import torch
from quad_kernels import InputSplit
from torch import nn

RESERVED_KINDS = ("residual", "outlier", "bias")  # parts that every linear may have


class LinearTerm(nn.Module):
    """Computes something from the unsplit input of a `QuadLinear`, which is added to the layer's output.

    A subclass is one kind of term. Its state dict is what a checkpoint stores of it, under `<linear>.<kind>.`; its
    section of config.json is `quad.linears.<role>.terms.<kind>`. docs/developer/plugins.md has an example.

    Attributes:
        kind: name of the kind: in the checkpoint, and of the child module.
    """

    kind: ClassVar[str]

    @classmethod
    def unset(cls, section: dict[str, Any], split: InputSplit, out_features: int, dtype: torch.dtype) -> "LinearTerm":
        """Returns a term whose tensors are still to be filled from a checkpoint.

        Args:
            section: what `section` returned when the checkpoint was written.
            split: division of the layer's input.
            out_features: number of output channels.
            dtype: of the model.

        Raises:
            ValueError: if the section is damaged.
        """
        raise NotImplementedError(f"{cls.__name__} has no `unset`")

    def section(self) -> dict[str, Any]:
        """Returns what `unset` must be told, as values for JSON; alike in every block."""
        raise NotImplementedError(f"{type(self).__name__} has no `section`")

    def dense(self) -> torch.Tensor:
        """Returns the matrix that the term applies to an unquantized input, `[out, in]`, float64."""
        raise NotImplementedError(f"{type(self).__name__} has no `dense`")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the term for inputs `[..., in]`: `[..., out]`, floating point."""
        raise NotImplementedError(f"{type(self).__name__} has no `forward`")
