"""`inspect_model` and `compare_checkpoints`: activations, the cost of quantization by place, models side by side.

`quad inspect` and `quad compare` are thin layers over the two functions.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quad_modifiers.tools.inspection.checkpoint_comparison import compare_checkpoints as compare_checkpoints
    from quad_modifiers.tools.inspection.model_report import inspect_model as inspect_model

__all__ = ["compare_checkpoints", "inspect_model"]


def __getattr__(name: str) -> Any:
    if name == "compare_checkpoints":
        from quad_modifiers.tools.inspection.checkpoint_comparison import compare_checkpoints

        return compare_checkpoints
    if name == "inspect_model":
        from quad_modifiers.tools.inspection.model_report import inspect_model

        return inspect_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
