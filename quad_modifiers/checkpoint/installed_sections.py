"""The sections of a checkpoint, of this project and of plugins: installed on a stock model, and folded away again."""

import torch

from quad_modifiers.checkpoint.format import QuadFormat
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.plugins.checkpoint_parts import load_section


def install_sections(decoder: Decoder, quad: QuadFormat) -> None:
    """Makes room in a stock model for what the sections hold.

    Raises:
        PluginError: for a section that no installed package knows.
        ValueError: if one is damaged.
    """
    for name, content in quad.sections.items():
        load_section(name).install(decoder, content)


def fold_sections(decoder: Decoder, quad: QuadFormat, dtype: torch.dtype) -> None:
    """Folds the sections, none of which is a lasting one, into the weights; new weights are of `dtype`."""
    for name in quad.sections:
        load_section(name).fold(decoder, dtype)


def lasting_sections(quad: QuadFormat) -> list[str]:
    """Returns the sections that cannot be folded, by name: with them a model has no plain form."""
    return [name for name in quad.sections if not load_section(name).has_plain_form()]
