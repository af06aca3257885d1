"""What `generate` is told by a model's generation config, made fit to be saved.

transformers loads and uses a generation config with settings that have no effect, such as a temperature without
sampling, but refuses to save it.
"""

import logging
import re
from typing import Any

logger = logging.getLogger(__name__)

_NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)  # how transformers lists the settings without effect


def settle_generation(model: Any) -> None:
    """Unsets what has no effect in the generation config of a model, which generates the same afterwards, and warns.

    Raises:
        ValueError: if transformers refuses the generation config for another reason.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    reason = _refusal(generation)
    if reason is None:
        return
    unset = {name: getattr(generation, name) for name in _NAMED.findall(reason)}
    for name in unset:
        setattr(generation, name, None)
    left = _refusal(generation)
    if left is not None:
        for name, value in unset.items():
            setattr(generation, name, value)
        raise ValueError(
            f"the model's generation config cannot be saved: {' '.join(left.split())} Correct generation_config.json "
            "of the original, or model.generation_config"
        )
    logger.warning(
        "the generation config cannot be saved with %s, which has no effect as it is (do_sample=%s, num_beams=%s): "
        "unset, so that the checkpoint generates like the original; if it was meant, set do_sample or num_beams in the "
        "original's generation_config.json",
        ", ".join(f"{name}={value}" for name, value in unset.items()),
        generation.do_sample,
        generation.num_beams,
    )


def _refusal(generation: Any) -> str | None:
    """Returns why transformers will not save a generation config, None if it will."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None
