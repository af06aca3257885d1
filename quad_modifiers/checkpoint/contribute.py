"""What modifiers want to be stored with a model, declared in one place until the checkpoint is written."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.decoder import Decoder


class CheckpointSection:
    """A part of a checkpoint that belongs to no single linear; a plugin brings kinds of its own.

    A modifier that changes a model beyond its linears registers buffers or modules on it, which are saved with it, and
    contributes a section under the name of a subclass. docs/developer/plugins.md has an example.
    """

    @classmethod
    def install(cls, decoder: Decoder, section: dict[str, Any]) -> None:
        """Makes a stock model what the modifier made of it, its tensors still to be filled from the checkpoint.

        Args:
            decoder: the stock model.
            section: what the modifier contributed.

        Raises:
            ValueError: if the section is damaged.
        """
        raise NotImplementedError(f"{cls.__name__} has no `install`")

    @classmethod
    def fold(cls, decoder: Decoder, dtype: torch.dtype) -> None:
        """Folds what the section brought into the weights, so that the model is one of the stock class.

        A section without this method has no plain form: its checkpoints cannot be dequantized or made dense.

        Args:
            decoder: the model with its weights, on which `install` was called.
            dtype: of new weights; float64 if they are to be rounded later.
        """
        raise NotImplementedError(f"{cls.__name__} has no `fold`")

    @classmethod
    def has_plain_form(cls) -> bool:
        """Returns whether there is a `fold`."""
        return cls.fold.__func__ is not CheckpointSection.fold.__func__  # type: ignore[attr-defined]


@dataclass
class Contributions:
    """Contributions to a checkpoint that is still to be written.

    Attributes:
        basis: how the residual stream was projected, None if it was not.
        sections: content for `quad.sections` of config.json by name; each name is a kind that a plugin brings
            (`CheckpointSection`), which makes room for its tensors when the checkpoint is loaded.
        files: texts of files beside the weights, by name.
        recipe: the recipe that the model was compressed by, as YAML; other models may follow in the same process.
    """

    basis: dict[str, Any] | None = None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None


def contributions_of(model: nn.Module) -> Contributions:
    """Returns the contributions that the saver of a model holds, empty ones for a model without our saver."""
    held = getattr(model.__dict__.get("save_pretrained"), "contributions", None)
    return held if isinstance(held, Contributions) else Contributions()
