"""`get_plugin_manager`: how a distribution contributes modifiers, architectures, recipes and kernels.

See docs/developer/plugins.md for how to write a plugin. Importing this package imports neither llm-compressor nor any
plugin; that happens on the first call of one of its functions.
"""

from quad_modifiers.plugins.contributions import (
    ContributedBackend,
    ContributedModifier,
    ContributedRecipe,
    Contribution,
    PluginRow,
    architectures,
    kernel_backends,
    modifier_paths,
    plugin_table,
    recipe_files,
    recipe_folders,
)
from quad_modifiers.plugins.hookspecs import hookimpl, hookspec
from quad_modifiers.plugins.manager import (
    Distribution,
    FailedPlugin,
    PluginError,
    PluginWarning,
    QuadPluginManager,
    failed_plugins,
    get_plugin_manager,
)
from quad_modifiers.plugins.modifier_classes import PluginImportError, load_modifier, register_modifiers

__all__ = [
    "ContributedBackend",
    "ContributedModifier",
    "ContributedRecipe",
    "Contribution",
    "Distribution",
    "FailedPlugin",
    "PluginError",
    "PluginImportError",
    "PluginRow",
    "PluginWarning",
    "QuadPluginManager",
    "architectures",
    "failed_plugins",
    "get_plugin_manager",
    "hookimpl",
    "hookspec",
    "kernel_backends",
    "load_modifier",
    "modifier_paths",
    "plugin_table",
    "recipe_files",
    "recipe_folders",
    "register_modifiers",
]
