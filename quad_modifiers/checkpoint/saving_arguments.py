"""Arguments of `save_pretrained`: those that a QUAD model refuses because they would have no effect."""

import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

logger = logging.getLogger(__name__)

# Arguments of `save_pretrained`, of transformers now or before and of llm-compressor, that ask for what is done anyway
# with the values given; with any other value they would have no effect.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "save_compressed": (True,),
    "safe_serialization": (True,),
    "save_original_format": (True,),
    "save_peft_format": (True,),
    "distributed_checkpoint": (False,),
    "push_to_hub": (False,),
    "state_dict": (None,),
    "variant": (None,),
    "token": (None,),
    "skip_sparsity_compression_stats": (None, True),
    "disable_sparse_compression": (None, True),
}
_REMEDIES = {
    "save_compressed": "a QUAD model can only be saved compressed",
    "safe_serialization": "weights are always written as safetensors",
    "push_to_hub": "call model.push_to_hub(repo_id)",
    "token": "it is an argument of push_to_hub",
    "state_dict": "change the model, and save it then",
}


def check_saving_arguments(arguments: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Refuses arguments of a QUAD model's `save_pretrained` that would have no effect.

    Args:
        arguments: those given.
        known: names of those that have one.

    Raises:
        TypeError: for a name that is no argument.
        ValueError: for one without effect.
    """
    for name, value in arguments.items():
        if name in known:
            continue
        if name == "save_function":  # scripts for accelerate have it
            logger.warning("save_function has no effect when a QUAD model is saved: weights are written as safetensors")
            continue
        if name not in _HARMLESS:
            near = get_close_matches(name, [*known, *_HARMLESS, "max_shard_size", "is_main_process"], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"save_pretrained of a QUAD model takes no argument {name!r}{hint}")
        if not any(value is each for each in _HARMLESS[name]):
            shown = repr(value) if isinstance(value, (bool, str, int)) else f"a {type(value).__name__}"
            remedy = _REMEDIES.get(name, "omit it")
            raise ValueError(f"save_pretrained of a QUAD model does not take {name}={shown}: {remedy}")
