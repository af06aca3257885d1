"""Opens what is inspected: a folder or Hub id, checked before the weights are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quad_modifiers.architectures import Architecture, find_architecture
from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
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


@dataclass(frozen=True)
class Candidate:
    """A model whose config was read and found fit; `quantized` by whatever method."""

    name: str
    architecture: Architecture
    quad: QuadFormat | None
    quantized: str | None

    def load(self) -> Opened:
        """Loads the weights in the dtype of the checkpoint."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.name, dtype="auto")
        return Opened(self.name, model.eval(), self.architecture, self.quad)


def look_at(name: str | Path) -> Candidate:
    """Reads the config of a folder or Hub id.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no causal language model of a supported architecture, or a damaged checkpoint.
    """
    from transformers import AutoConfig

    text = str(name)
    if _looks_local(name):
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no model folder {text}")
        text = str(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} has no config.json; it holds no model")
    config = AutoConfig.from_pretrained(text)
    section = getattr(config, "quantization_config", None)
    section = section if section is None or isinstance(section, dict) else section.to_dict()
    method = None if section is None else str(section.get("quant_method"))
    known = architectures()
    if method != QUANT_METHOD:
        return Candidate(text, find_architecture(config, known), None, method)
    assert section is not None
    quad = read_format(section.get("quad"))
    if quad.base_model_type not in known:
        raise ValueError(
            f"{text}: the checkpoint's base model type {quad.base_model_type!r} is not supported here; supported are "
            f"{', '.join(sorted(known))}"
        )
    return Candidate(text, known[quad.base_model_type], quad, method)


def _looks_local(name: str | Path) -> bool:
    text = str(name)
    return (
        isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).parent.is_dir()
    )


def need_unquantized(candidate: Candidate, what: str) -> None:
    """Checks that a model is in full precision.

    Raises:
        ValueError: if it is quantized, naming the method.
    """
    if candidate.quantized is not None:
        raise ValueError(
            f"{candidate.name} is quantized ({candidate.quantized}), but {what} must be the unquantized original"
        )


def tokenizer_of(name: str) -> Any:
    """Loads the tokenizer of a model.

    Raises:
        ValueError: if it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no tokenizer, so no text can be read; save the original's into it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({name!r})"
        ) from error
