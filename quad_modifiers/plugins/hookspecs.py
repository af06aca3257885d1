"""The hooks that a plugin may implement. Every hook returns plain values and takes no argument.

A plugin module marks its functions with ``hookimpl``, imported from here or made with
``pluggy.HookimplMarker("quad_modifiers")``, which needs no import of this package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from quad_modifiers.model.architecture import Architecture

PROJECT_NAME = "quad_modifiers"
"""Project name of pluggy and name of the entry-point group."""

HOOK_PREFIX = "quad_modifiers_"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def quad_modifiers_modifiers() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Returns the modifiers by recipe name: ``{"WeightClip": "my_package.clip:WeightClip"}``.

    The path is imported only when a recipe or llm-compressor needs the class. The recipe name must equal the
    class name, because llm-compressor saves recipes under the class name.
    """


@hookspec
def quad_modifiers_architectures() -> Sequence["Architecture"]:  # type: ignore[empty-body]
    """Returns the architecture mappings, at most one for each ``model_type`` of transformers."""


@hookspec
def quad_modifiers_recipe_folders() -> Sequence[Path]:  # type: ignore[empty-body]
    """Returns existing folders whose ``*.yaml`` files become recipes under their bare names."""


@hookspec
def quad_modifiers_kernel_backends() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Returns the kernel backends by name: ``{"my_gpu": "my_package.kernels:backend"}``."""


@hookspec
def quad_modifiers_linear_terms() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Returns the kinds of terms of a linear by name: ``{"low_rank": "my_package.low_rank:LowRank"}``.

    The class is a `quad_modifiers.nn.term.LinearTerm` of that `kind`; the name stands in checkpoints.
    """


@hookspec
def quad_modifiers_checkpoint_sections() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Returns the sections of a checkpoint by name: ``{"key_basis": "my_package.keys:KeyBasis"}``.

    The class is a `quad_modifiers.checkpoint.contribute.CheckpointSection`; the name stands in checkpoints.
    """
