"""`inspect_model` and `compare_checkpoints`: activations, the cost of quantization by place, models side by side.

`quad inspect` and `quad compare` are thin layers over the two functions.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quad_modifiers.tools.inspection.checkpoint_comparison import compare_checkpoints as compare_checkpoints
    from quad_modifiers.tools.inspection.model_report import inspect_model as inspect_model

__all__ = ["compare_checkpoints", "inspect_model"]
_HOMES = {"compare_checkpoints": "checkpoint_comparison", "inspect_model": "model_report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
