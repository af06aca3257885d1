"""The arguments of llm-compressor's `oneshot`: what each does here, and what to write in place of those that would do
nothing.

Data are cut and loaded by this package, so what llm-compressor has about data, loading and saving never takes effect.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quad_modifiers.checkpoint.whole_model import DTYPES
from quad_modifiers.passes.calibration_stream import working_device

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

PASSED = ("pipeline", "moe_calibrate_all_experts", "log_dir")
"""Arguments that llm-compressor acts on whatever the recipe."""

SEQUENTIAL = (
    "tracing_ignore",
    "sequential_targets",
    "sequential_offload_device",
    "sequential_targets_per_subgraph",
    "sequential_prefetch",
    "propagate_error",
)
"""Arguments of llm-compressor's own calibration, which only its own modifiers go through."""

_DTYPE_NAMES = {"half": "float16", "full": "float32"}  # what llm-compressor calls them as well


class _NotTaken(NamedTuple):
    """An argument without effect: values that ask for nothing else than what is done, and the remedy."""

    harmless: tuple[Any, ...]
    remedy: str


_MAP_BEFORE = "map the data set before, and give it as `dataset`"
_ONE_BY_ONE = "windows are run one by one"
_NO_WORKERS = "windows are cut in this process"

_NOT_TAKEN = {
    "config_name": _NotTaken((None,), "the config.json beside the weights is read"),
    "save_compressed": _NotTaken((True,), "a checkpoint is always written compressed; `quad_modifiers` loads it"),
    "recipe_args": _NotTaken((None,), "give overrides=['Modifier.field=value']"),
    "stage": _NotTaken((None,), "a recipe has one stage, which is run"),
    "clear_sparse_session": _NotTaken((False, None), "call llmcompressor.reset_session() afterwards"),
    "dataset_path": _NotTaken((None,), "give the path as `dataset`"),
    "dvc_data_repository": _NotTaken((None,), "fetch the file, and give its path as `dataset`"),
    "preprocessing_func": _NotTaken((None,), _MAP_BEFORE),
    "remove_columns": _NotTaken((None,), _MAP_BEFORE),
    "raw_kwargs": _NotTaken((None, {}), "call datasets.load_dataset with them, and give the result as `dataset`"),
    "streaming": _NotTaken((True, False, None), "a data set of the Hub is read as far as it is needed anyway"),
    "concatenate_data": _NotTaken((True,), "text is always one stream; give token ids, a row for each sample"),
    "shuffle_calibration_samples": _NotTaken((True,), "windows are drawn with `seed`; a DataLoader keeps its order"),
    "pad_to_max_length": _NotTaken((False,), _ONE_BY_ONE + ", so nothing is padded"),
    "batch_size": _NotTaken((1,), _ONE_BY_ONE),
    "data_collator": _NotTaken(("truncation",), _ONE_BY_ONE),
    "overwrite_cache": _NotTaken((False,), "no preprocessed data are kept"),
    "preprocessing_num_workers": _NotTaken((None,), _NO_WORKERS),
    "dataloader_num_workers": _NotTaken((0,), _NO_WORKERS),
    "min_tokens_per_module": _NotTaken((None,), "no release of llm-compressor that is supported here reads it"),
    "quantization_aware_calibration": _NotTaken((True,), "llm-compressor has retired it"),
    "use_loss_mask": _NotTaken((False,), "windows carry no loss mask"),
}


def check_arguments(arguments: dict[str, Any], own: Sequence[str]) -> None:
    """Refuses arguments that nobody takes, and those of llm-compressor that would have no effect.

    Args:
        arguments: those that `quad_modifiers.oneshot` has no parameter for.
        own: names of its parameters, for near names.

    Raises:
        TypeError: for a name that neither `oneshot` knows.
        ValueError: for an argument without effect, with what to do instead.
    """
    for name, value in arguments.items():
        if name in PASSED or name in SEQUENTIAL:
            continue
        refused = _NOT_TAKEN.get(name)
        if refused is None:
            near = get_close_matches(name, [*own, *PASSED, *SEQUENTIAL, *_NOT_TAKEN], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"oneshot takes no argument {name!r}{hint}")
        if not any(type(value) is type(each) and value == each for each in refused.harmless):
            shown = getattr(value, "__name__", None) or repr(value)
            raise ValueError(f"{name}={shown} has no effect here: {refused.remedy}; omit it")


def check_for_recipe(arguments: dict[str, Any], device: str | None, modifiers: "Sequence[Modifier]") -> None:
    """Refuses arguments that nothing in the recipe reads.

    Raises:
        ValueError: for an argument of llm-compressor's calibration without a modifier of its own, or a device that its
            modifiers would not work on.
    """
    stock = [type(each).__name__ for each in modifiers if type(each).__module__.startswith("llmcompressor.")]
    unread = [name for name in SEQUENTIAL if name in arguments]
    if unread and not stock:
        raise ValueError(
            f"{', '.join(unread)} concerns llm-compressor's own modifiers, of which the recipe has none; omit it"
        )
    if device is not None and stock and torch.device(device).type != working_device().type:
        raise ValueError(
            f"device={device!r} has no effect on {', '.join(stock)}, which llm-compressor places itself; omit it, and "
            "hide GPUs with CUDA_VISIBLE_DEVICES"
        )


def dtype_name(precision: Any) -> str:
    """Returns the dtype that `precision` names, as `LoadingOptions` takes it.

    Raises:
        ValueError: if it names none.
    """
    text = str(precision).removeprefix("torch.")
    name = _DTYPE_NAMES.get(text, text)
    if name not in DTYPES:
        raise ValueError(f"precision={text!r} is no dtype to load weights in; choose {', '.join(DTYPES)}")
    return name
