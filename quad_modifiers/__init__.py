"""QUAD: 4-bit weights and activations with a full-precision outlier subspace, as llm-compressor modifiers.

Importing this package loads the plugins, teaches transformers to load QUAD checkpoints, and registers the modifiers
with llm-compressor as soon as llm-compressor itself is imported (loading a checkpoint does not need it).
"""

from typing import TYPE_CHECKING, Any

import wrapt

from quad_modifiers.checkpoint.loader import register_loader

if TYPE_CHECKING:
    from quad_modifiers.compression import oneshot as oneshot

__version__ = "0.1.0"
__all__ = ["__version__", "oneshot"]


def _register_modifiers(_: object) -> None:
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


register_loader()
_register_kernel_backends()
wrapt.register_post_import_hook(_register_modifiers, "llmcompressor")
