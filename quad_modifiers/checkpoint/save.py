"""Writes a compressed model as a QUAD checkpoint, or as a plain compressed-tensors one where that can express it.

The folder is written under a temporary name beside its target and renamed when it is complete.
"""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from quad_modifiers.checkpoint.contribute import Contributions, contributions_of
from quad_modifiers.checkpoint.describe import Described, describe_linears, quantization_config
from quad_modifiers.checkpoint.generation_settings import settle_generation
from quad_modifiers.checkpoint.models import (
    push_to_hub,
    quad_model_type,
    register_models,
    set_tripwire,
)
from quad_modifiers.checkpoint.saving_arguments import check_saving_arguments
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.on_disk import is_offloading, let_go
from quad_modifiers.output_folder import check_space, check_target, complete_or_absent, user_path
from quad_modifiers.records.checksums import write_checksums
from quad_modifiers.records.inventory import INDEX_NAME

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model{suffix}.safetensors"
_USUAL_SHARD_SIZE = "5GB"
_SHARD_SIZE_OFFLOADED = "300MB"  # where weights are on the disk: a shard is read as a whole while it is written


def attach_saver(model: nn.Module, architecture: Architecture) -> None:
    """Makes `model.save_pretrained` write a QUAD checkpoint (llm-compressor's own wrapper loses our config).

    `model.push_to_hub` publishes one, with a model card.
    """
    model.save_pretrained = CheckpointSaver(model, architecture)
    model.push_to_hub = partial(push_to_hub, model)


class CheckpointSaver:
    """Stands in for `PreTrainedModel.save_pretrained` on a model that is being compressed.

    Args:
        model: the model that it is attached to.
        architecture: names of its parts.

    Attributes:
        contributions: what modifiers want to be stored with the model.
    """

    _overridden = True  # llm-compressor's mark of a replaced save_pretrained

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.contributions = Contributions()

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        max_shard_size: str | int = _USUAL_SHARD_SIZE,
        **arguments: Any,
    ) -> None:
        """Writes the checkpoint; nothing where this is not the main process.

        Raises:
            ValueError: for an argument that would have no effect, such as `save_compressed=False`.
        """
        check_saving_arguments(arguments)
        if is_main_process:
            save_checkpoint(self.model, self.architecture, user_path(save_directory), max_shard_size=max_shard_size)


def save_checkpoint(
    model: nn.Module,
    architecture: Architecture,
    folder: Path,
    max_shard_size: str | int = _USUAL_SHARD_SIZE,
) -> None:
    """Writes model, config, generation config, the recipe and the checksums of them all.

    Args:
        model: with `QuadLinear` linears.
        architecture: names of its parts.
        folder: must not exist or be empty.
        max_shard_size: largest size of one weight file.

    Raises:
        FileExistsError: if `folder` is not empty.
        OSError: if the disk is full; nothing is left behind.
        ValueError: if the model cannot be expressed in the format.
    """
    check_target(folder)
    settle_generation(model)
    decoder, contributions = Decoder(model, architecture), contributions_of(model)
    described = describe_linears(decoder, contributions)
    plain = described.plain
    tensors = dict(_tensors(model, plain))
    if model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{architecture.head}.")}
    config = _config(decoder, described, contributions)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_space(folder, size)
    with complete_or_absent(folder) as temporary:
        write_tensors(tensors, temporary, max_shard_size)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(temporary)
        if contributions.recipe:
            (temporary / "recipe.yaml").write_text(contributions.recipe, encoding="utf-8")
        for name, text in contributions.files.items():
            (temporary / name).write_text(text)
        write_checksums(temporary)
    kind = "compressed-tensors" if plain else "QUAD"
    logger.info("wrote a %s checkpoint of %.1f MB", kind, size / 1e6)


def _tensors(model: nn.Module, plain: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a checkpoint; those of a stock quantizer in our terms."""
    containers = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, QuadLinear)}
    residuals = tuple(f"{name}residual." for name in containers)
    for name, tensor in model.state_dict().items():
        if not name.startswith(residuals):
            yield name, tensor.contiguous()
    for name, module in containers.items():
        packed, prefix = module.packed(), name if plain else f"{name}residual."
        if packed is None:
            yield f"{prefix}weight", module.residual.weight.data.contiguous()
        else:
            yield from packed.state_dict(prefix=prefix).items()


def _config(decoder: Decoder, described: Described, contributed: Contributions) -> dict[str, Any]:
    model, architecture = decoder.model, decoder.architecture
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    config.pop("auto_map", None)  # code that the original brought along, and the checkpoint does not
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if not described.plain:
        register_models([architecture.model_type])
        config["model_type"] = quad_model_type(architecture.model_type)
        config["architectures"] = [
            f"Quad{name.removeprefix('Quad')}" for name in config.get("architectures") or [type(model).__name__]
        ]
        set_tripwire(config)
    config["quantization_config"] = quantization_config(decoder, described, contributed)
    if config["quantization_config"] is None:
        del config["quantization_config"]
    return config


def write_tensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: str | int) -> None:
    """Writes one safetensors file, or shards and their index."""
    if is_offloading() and max_shard_size == _USUAL_SHARD_SIZE:
        max_shard_size = _SHARD_SIZE_OFFLOADED
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=WEIGHTS_NAME, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].cpu() for name in names}, folder / filename, metadata={"format": "pt"})
        for name in names:
            let_go(tensors[name])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
