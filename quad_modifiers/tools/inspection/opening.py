"""Opens what is inspected: a folder or Hub id, checked before the weights are loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
from quad_modifiers.checkpoint.locate import check_weights, model_folder
from quad_modifiers.model.architecture import Architecture, find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.plugins import architectures


@dataclass(frozen=True)
class Opened:
    """A model that was loaded.

    Attributes:
        name: folder or Hub id.
        model: the transformers model, in evaluation mode.
        architecture: names of its parts.
        quad: what its config says, None if it is no QUAD checkpoint.
    """

    name: str
    model: Any
    architecture: Architecture
    quad: QuadFormat | None

    @cached_property
    def decoder(self) -> Decoder:
        """The model seen through its architecture."""
        return Decoder(self.model, self.architecture)


@dataclass(frozen=True)
class Candidate:
    """A model whose config was read and found fit; `quantized` by whatever method."""

    name: str
    config: Any
    architecture: Architecture
    quad: QuadFormat | None
    quantized: str | None

    def load(self) -> Opened:
        """Loads the weights in the dtype of the checkpoint."""
        from transformers import AutoModelForCausalLM

        check_weights(self.name)
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto")
        return Opened(self.name, model.eval(), self.architecture, self.quad)


def look_at(name: str | Path) -> Candidate:
    """Reads the config of a folder or Hub id.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a part of a model.
        ValueError: if it holds no causal language model of a supported architecture, or a damaged checkpoint.
    """
    from transformers import AutoConfig

    text = str(model_folder(name) or name)
    config = AutoConfig.from_pretrained(text)
    section = getattr(config, "quantization_config", None)
    section = section if section is None or isinstance(section, dict) else section.to_dict()
    method = None if section is None else str(section.get("quant_method"))
    known = architectures()
    if method != QUANT_METHOD:
        return Candidate(text, config, find_architecture(config, known), None, method)
    assert section is not None
    quad = read_format(section.get("quad"))
    if quad.base_model_type not in known:
        raise ValueError(
            f"{text}: the checkpoint's base model type {quad.base_model_type!r} is not supported here; supported are "
            f"{', '.join(sorted(known))}"
        )
    return Candidate(text, config, known[quad.base_model_type], quad, method)


def need_same_type(candidate: Candidate, original: Candidate) -> None:
    """Checks, as far as the configs tell, that one was made of the other.

    Raises:
        ValueError: if the model types differ.
    """
    mine, theirs = candidate.architecture.model_type, original.architecture.model_type
    if mine != theirs:
        raise ValueError(f"{candidate.name} is made of a {mine} model, but the baseline is a {theirs} model")


def need_unquantized(candidate: Candidate, what: str) -> None:
    """Checks that a model is in full precision.

    Raises:
        ValueError: if it is quantized, naming the method.
    """
    if candidate.quantized is not None:
        raise ValueError(
            f"{candidate.name} is quantized ({candidate.quantized}), but {what} must be the unquantized original"
        )
