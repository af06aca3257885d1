"""Opens a model that somebody named: a folder or Hub id, whose config is read and checked before anything is loaded."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions, load_whole_model
from quad_modifiers.model.architecture import Architecture, find_architecture
from quad_modifiers.plugins import architectures
from quad_modifiers.records.inventory import Inventory, read_inventory

_WEIGHTS = (".safetensors", ".bin")


class OwnCodeError(ValueError):
    """A model or tokenizer brings code along, which may not run."""


@dataclass(frozen=True)
class Opened:
    """A model whose config was read; its weights are not loaded.

    Attributes:
        name: folder or Hub id, as transformers takes it.
        folder: folder of the model, None for a Hub id.
        config: transformers config.
        quantized: quant_method of the config, None for an unquantized model.
        quad: `quad` section of a QUAD checkpoint, None for any other model.
        options: how it is loaded.
    """

    name: str
    folder: Path | None
    config: Any
    quantized: str | None
    quad: QuadFormat | None
    options: LoadingOptions = DEFAULTS

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
        """Returns the model, by default in the dtype of its weights, in evaluation mode; packed weights stay packed.

        Raises:
            FileNotFoundError: if there are no weights.
            ValueError: naming weights that are missing, surplus or of another shape.
        """
        self.check_weights()
        with _named_errors(self.name):
            return load_whole_model(self.name, self.options)

    def skeleton(self) -> Any:
        """Returns the model on the meta device: its parts and their names, without weights."""
        with torch.device("meta"), _named_errors(self.name):
            return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.options.trust_remote_code)

    def tokenizer(self) -> Any:
        """Returns the tokenizer.

        Raises:
            ValueError: if there is none.
        """
        return tokenizer_of(self.name, self.options)

    def inventory(self) -> Inventory:
        """Returns what the files of the folder say of the tensors.

        Raises:
            FileNotFoundError: naming a file that is missing.
            ValueError: for a Hub id; naming a file that is damaged.
        """
        if self.folder is None:
            raise ValueError(f"{self.name} is not a folder; download it first")
        return read_inventory(self.folder)


def open_checkpoint(name: str | Path, known_only: bool = False, options: LoadingOptions = DEFAULTS) -> Opened:
    """Opens a folder or Hub id.

    A string is a Hub id if no folder has that name and it has the form OWNER/NAME, OWNER not being a folder either.

    Args:
        name: any causal language model of transformers, quantized or not.
        known_only: True refuses architectures that this package does not know.
        options: how config, weights and tokenizer are loaded.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.json.
        ValueError: if the config is damaged, the architecture is refused, or a folder is given with a revision.
    """
    folder = _folder(name)
    text = str(folder or name)
    if folder is not None and options.revision is not None:
        raise ValueError(
            f"{folder} is a folder, which has no revision {options.revision!r}; give the Hub id, or omit the revision"
        )
    with _named_errors(text):
        config = AutoConfig.from_pretrained(text, **options.of_hub())
    section = getattr(config, "quantization_config", None)
    section = section if section is None or isinstance(section, dict) else section.to_dict()
    method = None if section is None else str(section.get("quant_method"))
    quad = read_format(section.get("quad")) if section is not None and method == QUANT_METHOD else None
    opened = Opened(text, folder, config, method, quad, options)
    if known_only:
        _ = opened.architecture
    return opened


@contextmanager
def _named_errors(name: str | Path) -> Iterator[None]:
    """Names what transformers cannot load, and words its refusal to run the code that comes along."""
    try:
        yield
    except OSError as error:
        if str(name) in str(error):
            raise
        raise OSError(f"{name} cannot be loaded: {error}") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise OwnCodeError(
            f"{name} brings code of its own along, which would run on this machine; read it, then allow it with "
            "trust_remote_code (--trust-remote-code; trust_remote_code_model in oneshot)"
        ) from error


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
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter, not a model; merge it into its base (merge_and_unload), and save the result"
        )
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


def load_tokenizer(name: str | Path, options: LoadingOptions = DEFAULTS) -> Any:
    """Returns the tokenizer of a folder or Hub id.

    Raises:
        OwnCodeError: if it brings code along that may not run.
        OSError, ValueError: if it has none, with transformers' reason.
    """
    with _named_errors(name):
        return AutoTokenizer.from_pretrained(os.path.expanduser(name), **options.of_hub())


def find_tokenizer(name: str | Path, options: LoadingOptions = DEFAULTS) -> Any:
    """Returns the tokenizer of a folder or Hub id, None if it has none.

    Raises:
        OwnCodeError: if it brings code along that may not run.
    """
    try:
        return load_tokenizer(name, options)
    except OwnCodeError:
        raise
    except (OSError, ValueError):
        return None


def tokenizer_of(name: str | Path, options: LoadingOptions = DEFAULTS) -> Any:
    """Returns the tokenizer of a folder or Hub id.

    Raises:
        ValueError: if it has none, with the remedy.
    """
    try:
        return load_tokenizer(name, options)
    except OwnCodeError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no tokenizer, so no text can be read; save the original's into it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(name)!r})"
        ) from error
