"""Loads a model and refuses it unless its files hold all of it.

transformers fills what a folder lacks with random numbers, drops what the model has no place for, and goes on with a
line in its log: a base model without a head, or a reward model, becomes a language model that speaks noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

from quad_modifiers.checkpoint.transforms import apply_transforms, transform_names, transforms_of
from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.records.inventory import read_json

DTYPES = ("auto", "bfloat16", "float16", "float32")
_OF_FILES = ("revision", "cache_dir", "token", "subfolder", "local_files_only")  # arguments that choose files
_LISTED = 5  # tensors named in one error message


@dataclass(frozen=True)
class LoadingOptions:
    """How models, their configs and their tokenizers are loaded.

    Attributes:
        revision: branch, tag or commit of a Hub id; None is its main branch.
        trust_remote_code: True to run the code that a model brings along.
        dtype: "auto" for that of the weights, or one of `DTYPES`.
        device: "cpu", "cuda", ...; None leaves it to whoever loads.
        cache_dir: folder in place of the Hub's cache.

    Raises:
        ValueError: if there is no such dtype, or the device is none of this machine's.
    """

    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"there is no dtype {self.dtype!r} here; choose {', '.join(DTYPES)}")
        if self.device is not None:
            check_device(self.device)

    def of_hub(self) -> dict[str, Any]:
        """Returns the arguments that configs, tokenizers and models of transformers have in common; none by default."""
        given = {"revision": self.revision, "cache_dir": None if self.cache_dir is None else str(self.cache_dir)}
        shared: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return {**shared, "trust_remote_code": True} if self.trust_remote_code else shared


DEFAULTS = LoadingOptions()


def check_device(device: str) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ValueError: with torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {device!r} cannot be used ({reason}); give cpu, or omit it") from error


def load_whole_model(name: str | Path, options: LoadingOptions = DEFAULTS, **arguments: Any) -> Any:
    """Returns a causal language model in evaluation mode, every tensor of which comes from its files.

    Online transforms of a compressed-tensors checkpoint, which transformers leaves out, are attached.

    Args:
        name: folder or Hub id, quantized or not.
        options: dtype, revision and so on; the model goes to `options.device` where that is given.
        arguments: more for transformers' `from_pretrained`.

    Raises:
        ValueError: naming tensors that are missing, of another shape, or no part of the model.
    """
    given = {"dtype": options.dtype, **options.of_hub(), **arguments}
    # Mismatches come with the report instead of an error that names none of them.
    model, report = AutoModelForCausalLM.from_pretrained(
        str(name), **given, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # The model's config has lost them: transformers keeps what it knows of. A GGUF file has no config beside it.
    where = {key: given[key] for key in _OF_FILES if key in given}
    config = cached_file(str(name), "config.json", **where, _raise_exceptions_for_missing_entries=False)
    transforms = None if config is None else transforms_of(read_json(Path(config)))
    if transforms is not None:
        marks = transform_names(transforms)
        report = {**report, "unexpected_keys": [key for key in report["unexpected_keys"] if not _marked(key, marks)]}
    check_report(str(name), type(model).__name__, report)
    if config is not None and transforms is not None:
        apply_transforms(model, transforms, Path(config).parent)
    return model.eval() if options.device is None else model.to(options.device).eval()


def load_reference(name: str | Path, options: LoadingOptions = DEFAULTS) -> Any:
    """Returns an original to be measured beside what was made of it, `in_fast_dtype`.

    The arguments are those of `load_whole_model`.
    """
    return in_fast_dtype(load_whole_model(name, options))


def in_fast_dtype(model: Any) -> Any:
    """Returns a model in float32 instead of bfloat16 where the processor emulates that.

    It is several times faster there, and rounds less.
    """
    emulated = model.dtype == torch.bfloat16 and fast_dtype(model.device) == torch.float32
    return model.float() if emulated else model


def _marked(tensor: str, names: tuple[str, ...]) -> bool:
    return any(f".{name}." in tensor for name in names)


def check_report(name: str, model_class: str, report: Mapping[str, Any]) -> None:
    """Refuses a model whose loading left something out or made something up.

    Args:
        name: the model, for the message.
        model_class: the class that it was loaded as.
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model. transformers has taken
            out of it what is harmless: tied heads, buffers that are computed, tensors that a class is known not to
            read.

    Raises:
        ValueError: naming the tensors.
    """
    problems = [f"{tensor} is missing" for tensor in sorted(report["missing_keys"])]
    problems += [
        f"{tensor} has shape {list(found)}, needed is {list(needed)}"
        for tensor, found, needed in sorted(report["mismatched_keys"])
    ]
    problems += [f"{tensor} is not part of the model" for tensor in sorted(report["unexpected_keys"])]
    problems += [str(error) for error in report.get("error_msgs") or ()]
    if problems:
        more = f" and {len(problems) - _LISTED} more problems" if len(problems) > _LISTED else ""
        raise ValueError(
            f"{name} is no whole {model_class}: {'; '.join(problems[:_LISTED])}{more}; give the complete causal "
            "language model (not a base, reward or classification model), or fetch it again"
        )
