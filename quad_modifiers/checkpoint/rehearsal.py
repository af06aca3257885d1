"""Saving, tried before the work: whatever of a checkpoint can be refused at the end is refused at the start."""

from pathlib import Path
from typing import Any

from quad_modifiers.checkpoint.generation_settings import settle_generation
from quad_modifiers.output_folder import rehearsal


def rehearse_saving(model: Any, tokenizer: Any, folder: Path) -> int:
    """Writes what is small of a checkpoint where `folder` will be made, and removes it: configs and tokenizer.

    Args:
        model: transformers model; what has no effect in its generation config is unset, with a warning.
        tokenizer: transformers tokenizer or processor, None without one.
        folder: output folder, empty or missing.

    Returns:
        The bytes of these files.

    Raises:
        ValueError: naming what cannot be saved and why.
        OSError: if nothing can be written there.
    """
    settle_generation(model)
    with rehearsal(folder) as temporary:
        parts = {
            "config": (model.config, "correct config.json of the original, or model.config"),
            "generation config": (getattr(model, "generation_config", None), "correct generation_config.json"),
            "tokenizer": (tokenizer, "give another `tokenizer`, or repair the files beside the model"),
        }
        for name, (part, remedy) in parts.items():
            if part is None:
                continue
            try:
                part.save_pretrained(temporary)
            except Exception as error:  # tokenizers of models with code of their own may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"the {name} of the model cannot be saved ({reason}); {remedy}") from error
        return sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
