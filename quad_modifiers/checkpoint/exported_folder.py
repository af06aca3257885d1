"""Writes an export: tensors, config, the files that go along, and the record of what was lost."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quad_modifiers.checkpoint.save import write_tensors
from quad_modifiers.output_folder import check_space, complete_or_absent
from quad_modifiers.records.calibration_record import CALIBRATION_NAME
from quad_modifiers.records.checksums import write_checksums
from quad_modifiers.records.export_record import EXPORT_NAME, Export

logger = logging.getLogger(__name__)

DAMAGED = "the checkpoint is damaged, get it again"  # a remedy for `check_finite`
_COMPANIONS = (
    "generation_config.json",
    "recipe.yaml",
    CALIBRATION_NAME,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def write_export(
    target: Path, source: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], record: Export
) -> None:
    """Writes the folder `target`, complete or not at all, with the tokenizer and its like from `source`.

    What the record says of losses and needs is logged as well.

    Raises:
        FileExistsError, OSError: if the target is not empty or the disk is full; nothing is left behind.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_space(target, needed)
    with complete_or_absent(target) as temporary:
        write_tensors(tensors, temporary, "5GB")
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for pattern in _COMPANIONS:
            for file in source.glob(pattern):
                shutil.copy2(file, temporary / file.name)
        (temporary / EXPORT_NAME).write_text(record.model_dump_json(indent=2) + "\n")
        write_checksums(temporary)
    logger.info("wrote a %s checkpoint of %.1f MB to %s", record.format, needed / 1e6, target)
    for note in record.notes:
        logger.warning("%s: %s", target.name, note)


def check_finite(tensors: nn.Module | dict[str, torch.Tensor], remedy: str) -> None:
    """Refuses tensors that hold NaN or infinite values, with what to do; loading checks only scales."""
    named = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    for name, tensor in named.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values; {remedy}")
