"""What modifiers want to be stored with a model, declared in one place until the checkpoint is written."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Contributions:
    """Contributions to a checkpoint that is still to be written.

    Attributes:
        sections: content for the `quad` section of config.json, by field; the format checks it.
        files: texts of files beside the weights, by name.
    """

    sections: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def contributions_of(model: nn.Module) -> Contributions:
    """Returns the contributions that the saver of a model holds, empty ones for a model without our saver."""
    held = getattr(model.__dict__.get("save_pretrained"), "contributions", None)
    return held if isinstance(held, Contributions) else Contributions()
