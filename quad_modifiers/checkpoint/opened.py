"""Opens a model that somebody named: a folder or Hub id, whose config is read and checked before anything is loaded."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
from quad_modifiers.model.architecture import Architecture, find_architecture
from quad_modifiers.plugins import architectures
from quad_modifiers.records.inventory import Inventory, read_inventory

_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Opened:
    """A model whose config was read; its weights are not loaded.

    Attributes:
        name: folder or Hub id, as transformers takes it.
        folder: folder of the model, None for a Hub id.
        config: transformers config.
        quantized: quant_method of the config, None for an unquantized model.
        quad: `quad` section of a QUAD checkpoint, None for any other model.
    """

    name: str
    folder: Path | None
    config: Any
    quantized: str | None
    quad: QuadFormat | None

    @property
    def architecture(self) -> Architecture:
        """Names of the model's parts.

        Raises:
            ValueError: if this package does not know the architecture.
        """
        if self.quad is None:
            return find_architecture(self.config, architectures())
        try:
            return stored_architecture(self.quad)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def need_quad(self) -> QuadFormat:
        """Returns the `quad` section.

        Raises:
            ValueError: if this is any other model.
        """
        if self.quad is None:
            raise ValueError(
                f"{self.name} is no QUAD checkpoint (its quant_method is {self.quantized!r}); make one with "
                "`quad compress`"
            )
        return self.quad

    def need_unquantized(self, what: str) -> None:
        """Refuses a quantized model where `what` must be none, naming the method."""
        if self.quantized is not None:
            raise ValueError(
                f"{self.name} is quantized ({self.quantized}), but {what} must be the unquantized original"
            )

    def need_same_type(self, original: "Opened") -> None:
        """Refuses models of two types: one cannot be made of the other."""
        mine, theirs = self.architecture.model_type, original.architecture.model_type
        if mine != theirs:
            raise ValueError(f"{self.name} is made of a {mine} model, but the baseline is a {theirs} model")

    def check_weights(self) -> None:
        """Checks that the folder holds a file of weights; a Hub id is not looked up.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self.folder is not None and not any(file.suffix in _WEIGHTS for file in self.folder.iterdir()):
            raise FileNotFoundError(f"{self.folder} has a config.json but no weights; fetch or write the model again")

    def load(self) -> Any:
        """Returns the model in the dtype of its weights, in evaluation mode; packed weights stay packed.

        Raises:
            FileNotFoundError: if there are no weights.
            ValueError: if the weights of a QUAD checkpoint do not fit its config.
        """
        self.check_weights()
        return AutoModelForCausalLM.from_pretrained(self.name, dtype="auto").eval()

    def tokenizer(self) -> Any:
        """Returns the tokenizer.

        Raises:
            ValueError: if there is none.
        """
        return tokenizer_of(self.name)

    def inventory(self) -> Inventory:
        """Returns what the files of the folder say of the tensors.

        Raises:
            FileNotFoundError: naming a file that is missing.
            ValueError: for a Hub id; naming a file that is damaged.
        """
        if self.folder is None:
            raise ValueError(f"{self.name} is not a folder; download it first")
        return read_inventory(self.folder)


def open_checkpoint(name: str | Path, known_only: bool = False) -> Opened:
    """Opens a folder or Hub id.

    A string is a Hub id if no folder has that name and it has the form OWNER/NAME, OWNER not being a folder either.

    Args:
        name: any causal language model of transformers, quantized or not.
        known_only: True refuses architectures that this package does not know.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.json.
        ValueError: if the config is damaged, or the architecture is refused.
    """
    folder = _folder(name)
    text = str(folder or name)
    config = AutoConfig.from_pretrained(text)
    section = getattr(config, "quantization_config", None)
    section = section if section is None or isinstance(section, dict) else section.to_dict()
    method = None if section is None else str(section.get("quant_method"))
    quad = read_format(section.get("quad")) if section is not None and method == QUANT_METHOD else None
    opened = Opened(text, folder, config, method, quad)
    if known_only:
        _ = opened.architecture
    return opened


def _folder(name: str | Path) -> Path | None:
    text = str(name)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        local = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
        if local or folder.parent.is_dir():
            raise FileNotFoundError(
                f"there is no model folder {text}; give the folder of a model or a Hub id OWNER/NAME"
            )
        return None
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; it holds no model")
    try:
        readable = isinstance(json.loads(config.read_text(encoding="utf-8")), dict)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{config} is damaged ({error}); fetch or write the model again") from error
    if not readable:
        raise ValueError(f"{config} is damaged (no JSON object); fetch or write the model again")
    return folder


def stored_architecture(quad: QuadFormat) -> Architecture:
    """Returns the architecture that a checkpoint was made of.

    Raises:
        ValueError: if this package and its plugins do not know it.
    """
    known = architectures()
    if quad.base_model_type not in known:
        raise ValueError(
            f"the checkpoint's base model type {quad.base_model_type!r} is not supported here; supported are "
            f"{', '.join(sorted(known))}"
        )
    return known[quad.base_model_type]


def load_tokenizer(name: str | Path) -> Any:
    """Returns the tokenizer of a folder or Hub id.

    Raises:
        OSError, ValueError: if it has none, with transformers' reason.
    """
    return AutoTokenizer.from_pretrained(os.path.expanduser(name))


def find_tokenizer(name: str | Path) -> Any:
    """Returns the tokenizer of a folder or Hub id, None if it has none."""
    try:
        return load_tokenizer(name)
    except (OSError, ValueError):
        return None


def tokenizer_of(name: str | Path) -> Any:
    """Returns the tokenizer of a folder or Hub id.

    Raises:
        ValueError: if it has none, with the remedy.
    """
    try:
        return load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no tokenizer, so no text can be read; save the original's into it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(name)!r})"
        ) from error
