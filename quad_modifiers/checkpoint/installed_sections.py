"""The sections of a checkpoint, of this project and of plugins: installed on a stock model, and folded away again."""

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


def fold_sections(decoder: Decoder, quad: QuadFormat) -> None:
    """Folds the sections into the weights; new ones are float64, to be rounded once by the caller."""
    for name in quad.sections:
        load_section(name).fold(decoder)


def check_plain_form(quad: QuadFormat) -> None:
    """Checks that every section can be folded.

    Raises:
        ValueError: naming those that cannot.
    """
    lasting = [name for name in quad.sections if not load_section(name).has_plain_form()]
    if lasting:
        raise ValueError(f"a model with {', '.join(lasting)} has no plain form; load it without dequantize")
