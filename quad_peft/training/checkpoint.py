"""Loading the checkpoint to tune, and writing it with an adapter merged."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from quad_modifiers.checkpoint.format import QUANT_METHOD
from quad_modifiers.checkpoint.locate import check_weights, model_folder
from quad_modifiers.output_folder import check_target, complete_or_absent
from quad_modifiers.records.tuning_record import TUNING_NAME, read_tuning

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"


def check_quad_checkpoint(checkpoint: str | Path) -> None:
    """Checks, by its config.json alone, that a folder or Hub id holds a QUAD checkpoint.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds another model.
    """
    section = getattr(read_config(checkpoint), "quantization_config", None)
    method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", None)
    if method != QUANT_METHOD:
        raise ValueError(
            f"{checkpoint} is no QUAD checkpoint (its quant_method is {method!r}); make one with `quad compress`"
        )


def read_config(model: str | Path) -> Any:
    """Returns the config of a folder or Hub id.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.json or no weights.
        ValueError: if its config.json is damaged.
    """
    from transformers import AutoConfig

    import quad_modifiers  # noqa: F401  (teaches transformers the format)

    config = AutoConfig.from_pretrained(str(model_folder(model) or model))
    check_weights(Path(model).expanduser())
    return config


def load_checkpoint(checkpoint: str | Path) -> Any:
    """Returns the model of a QUAD checkpoint; its weights stay packed.

    Raises:
        FileNotFoundError, ValueError: see `check_quad_checkpoint`.
    """
    from transformers import AutoModelForCausalLM

    check_quad_checkpoint(checkpoint)
    return AutoModelForCausalLM.from_pretrained(str(checkpoint), dtype="auto")


def load_tokenizer(checkpoint: str | Path) -> Any:
    """Returns the tokenizer beside a checkpoint, None if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(checkpoint))
    except (OSError, ValueError):
        return None


def merge(checkpoint: str | Path, adapter: str | Path, output: str | Path) -> None:
    """Writes a QUAD checkpoint with an adapter merged into its outlier weights; every runtime loads it as any other.

    Tokenizer and recipe are those of the checkpoint. The record of the training, `tuning.json`, comes from the
    adapter; `quad publish` reports it in the model card.

    Args:
        checkpoint: folder or Hub id of the QUAD checkpoint that the adapter was trained on.
        adapter: its folder.
        output: must not exist or be empty.

    Raises:
        FileExistsError: if `output` is not empty.
        FileNotFoundError: if one of the two is not there.
        ValueError: if the checkpoint is no QUAD checkpoint, or the adapter belongs to another one.
    """
    from peft import PeftModel

    adapter, output = Path(adapter), Path(output)
    check_target(output)
    checkpoint = str(model_folder(checkpoint) or checkpoint)
    check_quad_checkpoint(checkpoint)
    if not (adapter / _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{adapter} has no {_ADAPTER_CONFIG}; it is no adapter")
    read_tuning(adapter)  # a damaged record is noticed now, not when the result is published
    model = PeftModel.from_pretrained(load_checkpoint(checkpoint), str(adapter)).merge_and_unload()
    with complete_or_absent(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is None:
            logger.warning("%s has no tokenizer, so %s has none", checkpoint, output)
        else:
            tokenizer.save_pretrained(temporary)
        recipe = _file_of(checkpoint, "recipe.yaml")
        for file in (recipe, adapter / TUNING_NAME):
            if file is not None and file.is_file():
                shutil.copyfile(file, temporary / file.name)
    logger.info("wrote %s", output)


def _file_of(checkpoint: str | Path, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
