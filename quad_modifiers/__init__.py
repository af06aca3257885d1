"""QUAD: 4-bit weights and activations with a full-precision outlier subspace, as llm-compressor modifiers.

Importing this package teaches transformers to load QUAD checkpoints, PEFT to adapt them and lm-eval to evaluate them,
registers the kernel backends of plugins, and registers the modifiers with llm-compressor, as soon as those libraries
themselves are imported. So the import alone costs next to nothing, and loading a checkpoint needs no llm-compressor.
"""

import sys
from typing import TYPE_CHECKING, Any

import wrapt

from quad_modifiers._moved import keep_old_paths
from quad_modifiers.version import __version__

if TYPE_CHECKING:
    from quad_modifiers.compression import oneshot as oneshot

__all__ = ["__version__", "oneshot"]


def _after_transformers(_: object) -> None:
    # In the middle of llm-compressor's import a plugin that needs it would find it half-made; its own hook follows.
    spec = getattr(sys.modules.get("llmcompressor"), "__spec__", None)
    if not getattr(spec, "_initializing", False):
        _connect()


def _after_llmcompressor(_: object) -> None:
    _connect()


def _after_peft(_: object) -> None:
    from quad_peft.registration import connect_peft

    connect_peft()


def _after_lm_eval(_: object) -> None:
    from quad_modifiers.tools.evaluation.harness import register

    register()


def _connect() -> None:
    """Loads the plugins and registers what they and this package bring; may be called again at any time."""
    from quad_modifiers.checkpoint.loader import register_loader
    from quad_modifiers.plugins.manager import plugins_are_loading

    if plugins_are_loading():  # a plugin imports one of the two libraries; the call that loads the plugins goes on
        return
    register_loader()
    _register_kernel_backends()
    if sys.modules.get("llmcompressor") is not None:
        from quad_modifiers.plugins import register_modifiers

        register_modifiers()


def _register_kernel_backends() -> None:
    from quad_kernels.backends import register_backend_path

    from quad_modifiers.plugins import kernel_backends

    for backend in kernel_backends().values():
        register_backend_path(backend.name, backend.path, str(backend.distribution))


def __getattr__(name: str) -> Any:
    if name == "oneshot":
        from quad_modifiers.compression import oneshot

        return oneshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


keep_old_paths()
wrapt.register_post_import_hook(_after_transformers, "transformers")
wrapt.register_post_import_hook(_after_llmcompressor, "llmcompressor")
wrapt.register_post_import_hook(_after_peft, "peft")
wrapt.register_post_import_hook(_after_lm_eval, "lm_eval.models")
