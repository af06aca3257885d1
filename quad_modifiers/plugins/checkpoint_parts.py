"""Imports the kinds of checkpoint parts that plugins bring, when a checkpoint has one."""

import pkgutil
from typing import Any

from quad_modifiers.nn.term import RESERVED_KINDS, LinearTerm
from quad_modifiers.plugins.contributions import Contribution, checkpoint_sections, linear_terms
from quad_modifiers.plugins.manager import PluginError, failed_plugins


def load_term(kind: str) -> type[LinearTerm]:
    """Returns the class of a kind of linear term."""
    found = _load(linear_terms(), kind, "a linear has the term")
    if not (isinstance(found, type) and issubclass(found, LinearTerm)) or found.kind != kind or kind in RESERVED_KINDS:
        raise PluginError(
            f"{linear_terms()[kind].path} is not a LinearTerm of the kind {kind!r}, or that name is one of "
            f"{', '.join(RESERVED_KINDS)}"
        )
    return found


def load_section(name: str) -> Any:
    """Returns the class of a checkpoint section, a `quad_modifiers.checkpoint.contribute.CheckpointSection`."""
    return _load(checkpoint_sections(), name, "it has the section")


def _load(known: dict[str, Contribution], name: str, what: str) -> Any:
    if name not in known:
        failures = "".join(f"; {failure}" for failure in failed_plugins())
        raise PluginError(
            f"the checkpoint cannot be read: {what} {name!r}, which no installed package knows; install the plugin "
            f"that it was made with{failures}"
        )
    try:
        return pkgutil.resolve_name(known[name].path)
    except Exception as error:  # foreign code may raise anything; named here, the cause stays chained
        raise PluginError(
            f"{known[name].distribution}: {known[name].path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
