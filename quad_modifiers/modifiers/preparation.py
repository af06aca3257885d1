"""What every QUAD modifier does before it touches a model."""

import logging

import torch
from compressed_tensors.offload import remove_dispatch
from llmcompressor.core import State, active_session
from torch import nn

from quad_modifiers.checkpoint.save import attach_saver
from quad_modifiers.data.calibration import calibration_windows
from quad_modifiers.model.architecture import Architecture, check_structure, find_architecture
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.plugins import architectures

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = 64
DEFAULT_LENGTH = 512


def prepare_model(model: nn.Module) -> Architecture:
    """Checks the model, wraps the linears of its blocks in `QuadLinear` pass-throughs, and installs our saver.

    Calling it again changes nothing.

    Raises:
        ValueError: if the architecture is not supported, the model is quantized already, or a weight is NaN or Inf.
    """
    architecture = find_architecture(model.config, architectures())
    layers = model.get_submodule(architecture.layers)
    if any(isinstance(module, QuadLinear) for module in layers.modules()):
        return architecture
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the model is already quantized (its config has a quantization_config); start from the original"
        )
    check_structure(model, architecture)
    check_finite(model)
    for layer in layers.children():
        for path in architecture.linear_paths():
            parent, _, name = path.rpartition(".")
            linear = layer.get_submodule(path)
            setattr(layer.get_submodule(parent), name, QuadLinear(linear, name))
    attach_saver(model, architecture)
    return architecture


def check_finite(model: nn.Module) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        ValueError: naming the first bad tensor.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"{name} has {bad} NaN or infinite values; the model is damaged, get it again")


def begin_own_pass(model: nn.Module) -> None:
    """Takes the model out of llm-compressor's offloading and checks that the pass belongs to one modifier.

    An offloaded module copies an assigned parameter into the old storage, which a tied weight shares and whose dtype
    it keeps; the block-wise passes move one block at a time themselves.

    Raises:
        ValueError: if the user chose a pipeline that calibrates all modifiers at once, where the order of the recipe
            would be lost.
    """
    remove_dispatch(model, onload_tensors=False)
    modifiers = active_session().lifecycle.recipe.modifiers
    if len(modifiers) > 1:
        raise ValueError(
            "QUAD modifiers calibrate one after the other; use llm-compressor's default, pipeline='independent'"
        )
    for module in model.modules():
        if isinstance(module, QuadLinear):
            module.take_bias()


def calibration_batches(state: State) -> list[dict[str, torch.Tensor]]:
    """Returns the calibration batches of the session, or the default text where the user gave no data set."""
    loader = state.data.calib if state.data is not None else None
    if loader is not None:
        batches = [dict(batch) for batch in loader]
        if not batches:
            raise ValueError("the calibration data is empty; give at least 4 samples")
        return batches
    windows = calibration_windows(
        None, _tokenizer_of(state.model), num_samples=DEFAULT_SAMPLES, sequence_length=DEFAULT_LENGTH
    )
    batches = [{"input_ids": window} for window in windows]
    if state.data is not None:
        state.data.calib = batches
    return batches


def _tokenizer_of(model: nn.Module):  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    source = model.config._name_or_path
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no dataset was given and no tokenizer was found beside the model ({source!r}), so the default text "
            "cannot be tokenized; give `dataset` as token ids, or `tokenizer` with quad_modifiers.oneshot"
        ) from error
