"""`finetune` and `merge`: training of outlier adapters, and what it is made of.

Everything works on a stock `PeftModel`; transformers' Trainer and TRL's SFTTrainer train one just as well.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quad_peft.training.checkpoint import merge as merge
    from quad_peft.training.finetuning import FinetuneResult as FinetuneResult
    from quad_peft.training.finetuning import finetune as finetune
    from quad_peft.training.trainer import QuadTrainer as QuadTrainer
    from quad_peft.training.trainer import StopOnNonFinite as StopOnNonFinite
    from quad_peft.training.tuning_loop import TuningSettings as TuningSettings

_MODULES = {
    "FinetuneResult": "finetuning",
    "QuadTrainer": "trainer",
    "StopOnNonFinite": "trainer",
    "TuningSettings": "tuning_loop",
    "finetune": "finetuning",
    "merge": "checkpoint",
}
__all__ = ["FinetuneResult", "QuadTrainer", "StopOnNonFinite", "TuningSettings", "finetune", "merge"]


def __getattr__(name: str) -> Any:
    """Imports on first use: transformers' Trainer takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quad_peft.training.{_MODULES[name]}"), name)
