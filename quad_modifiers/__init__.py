"""QUAD: 4-bit weights and activations with a full-precision outlier subspace, as llm-compressor modifiers.

Importing this package teaches transformers to load QUAD checkpoints, PEFT to adapt them and lm-eval to evaluate them,
registers the kernel backends of plugins, and registers the modifiers with llm-compressor, as soon as those libraries
themselves are imported. So the import alone costs next to nothing, and loading a checkpoint needs no llm-compressor.
"""

from typing import TYPE_CHECKING, Any

from quad_modifiers._moved import keep_old_paths
from quad_modifiers.connect import install_hooks
from quad_modifiers.version import __version__

if TYPE_CHECKING:
    from quad_modifiers.compression import oneshot as oneshot

__all__ = ["__version__", "oneshot"]


def __getattr__(name: str) -> Any:
    if name == "oneshot":
        from quad_modifiers.compression import oneshot

        return oneshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


keep_old_paths()
install_hooks()
