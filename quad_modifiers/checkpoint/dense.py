"""Writes a quantized checkpoint as a plain one, every weight in floating point, that needs nothing of this project."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from quad_modifiers.checkpoint.exported_folder import DAMAGED, check_finite, write_export
from quad_modifiers.checkpoint.installed_sections import lasting_sections
from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.checkpoint.tensors import tied_names
from quad_modifiers.checkpoint.transforms import transforms_of
from quad_modifiers.checkpoint.whole_model import load_whole_model
from quad_modifiers.output_folder import check_target, user_path
from quad_modifiers.records.export_record import Export
from quad_modifiers.records.widths import group_bits, groups_of_roles, input_bits
from quad_modifiers.version import __version__

DENSE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_dense(source_folder: str | Path, target_folder: str | Path, dtype: str | None = None) -> Path:
    """Writes `source_folder` as a plain checkpoint of the stock architecture, which stock software loads.

    Outlier weights and online Hadamards are folded into the weights, which keep their rounding. What quantized the
    inputs is lost: the log and export.json say so.

    Args:
        source_folder: a QUAD checkpoint, or a compressed-tensors one without `transform_config`.
        target_folder: must not exist or be empty.
        dtype: "bfloat16", "float16" or "float32"; by default that of the source.

    Returns:
        The target folder.

    Raises:
        ValueError: for a checkpoint that is not quantized or has no plain form, naming a damaged tensor of the source,
            or for a dtype that is unknown or cannot hold the weights.
        FileNotFoundError: if there is no checkpoint in the source folder.
        FileExistsError, OSError: if the target is not empty or the disk is full; nothing is left behind.
    """
    source, target = user_path(source_folder), user_path(target_folder)
    if dtype is not None and dtype not in DENSE_DTYPES:
        raise ValueError(f"a plain checkpoint is written in {', '.join(DENSE_DTYPES)}, not in {dtype!r}")
    check_target(target)
    opened = open_checkpoint(source)
    _check_has_plain_form(opened)
    wanted = None if dtype is None else DENSE_DTYPES[dtype]
    model = _plain_model(opened, wanted)
    tensors = _stock_tensors(model)
    check_finite(tensors, f"{model.dtype} cannot hold it, take float32 or bfloat16")
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    record = Export(format="dense", source=opened.inventory().format, notes=_notes(opened), package=__version__)
    write_export(target, source, tensors, config, record)
    return target


def _check_has_plain_form(opened: Opened) -> None:
    if opened.quad is not None:
        lasting = lasting_sections(opened.quad)
        if lasting:
            raise ValueError(f"{opened.name}: a model with {', '.join(lasting)} has no plain form")
        return
    if opened.quantized != "compressed-tensors":
        what = "not quantized" if opened.quantized is None else f"quantized by {opened.quantized!r}"
        raise ValueError(f"{opened.name} is {what}; only QUAD and compressed-tensors checkpoints can be made dense")
    if transforms_of(opened.config):
        raise ValueError(
            f"{opened.name} has a transform_config, which stays behind in a plain checkpoint; export the QUAD "
            "checkpoint that it was made of"
        )


def _plain_model(opened: Opened, dtype: torch.dtype | None) -> Any:
    """The model with floating-point weights, in `dtype` or its own."""
    if opened.quad is not None:
        model = opened.load()
        check_finite(model, DAMAGED)
        return model.dequantize(dtype=dtype)  # computed in float64, rounded once
    opened.check_weights()
    with warnings.catch_warnings():
        # Of the config that is passed on only `dequantize` counts, which transformers finds worth a warning.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model = load_whole_model(
            opened.name, opened.options, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    check_finite(model, DAMAGED)
    return model if dtype is None else model.to(dtype)


def _stock_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a stock model of the same config, without those of a tied head."""
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(_unquantized(model.config))
    left_out = tied_names(stock)
    tensors = model.state_dict()
    return {name: tensors[name].contiguous() for name in stock.state_dict() if name not in left_out}


def _unquantized(config: Any) -> Any:
    content = config.to_dict()
    content.pop("quantization_config", None)
    return type(config).from_dict(content)


def _notes(opened: Opened) -> tuple[str, ...]:
    """Sentences on what the plain checkpoint lost."""
    if opened.quad is not None:
        bits: dict[str, dict[int, None]] = {role: {} for role in groups_of_roles(opened.quad)}
        for role, linear in opened.quad.variants():
            if linear.input is not None and role in bits:
                bits[role][input_bits(linear)] = None
        lost = ", ".join(f"{role} {' and '.join(map(str, found))}" for role, found in bits.items() if found)
    else:
        lost = ", ".join(str(each) for _, each in group_bits(opened.inventory()) if each != 16)
    if not lost:
        return ("weights are those of the quantized checkpoint, in floating point",)
    return (
        "weights are those of the quantized checkpoint, in floating point; inputs are not quantized any more (they had "
        f"these bits: {lost}), so it does not compute what the quantized checkpoint computes",
    )
