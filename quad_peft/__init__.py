"""Fine-tuning of QUAD checkpoints through their full-precision outlier weights, in terms of PEFT's LoRA."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quad_peft.config import OutlierLoraConfig as OutlierLoraConfig
    from quad_peft.equalize import equalize_outliers as equalize_outliers
    from quad_peft.layer import QuadLoraLayer as QuadLoraLayer
    from quad_peft.model import get_outlier_model as get_outlier_model

__all__ = ["OutlierLoraConfig", "QuadLoraLayer", "equalize_outliers", "get_outlier_model"]

_MODULES = {
    "OutlierLoraConfig": "config",
    "QuadLoraLayer": "layer",
    "equalize_outliers": "equalize",
    "get_outlier_model": "model",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: PEFT itself imports `quad_peft.registration` when it is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    import quad_modifiers  # noqa: F401  (teaches PEFT about QUAD layers)

    return getattr(import_module(f"quad_peft.{_MODULES[name]}"), name)
