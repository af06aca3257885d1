"""What of a checkpoint is trained, by the names of `--train`."""

from collections.abc import Iterable
from typing import Any

OUTLIERS, SCALES, WEIGHTS = "outliers", "scales", "weights"
PARTS = (OUTLIERS, SCALES, WEIGHTS)
_CLIPS = "clips"


def trained_parts(names: str | Iterable[str]) -> tuple[str, ...]:
    """Returns the parts that are named, in the order of `PARTS`.

    Args:
        names: names, or one text that separates them by commas.

    Raises:
        ValueError: naming the part that cannot be trained, or if "outliers" is not among them.
    """
    given = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    for name in given:
        if name == _CLIPS:
            raise ValueError(
                "train: clips are not trained: the format has one clip ratio for a role in all layers, which "
                "DynamicActQuant chooses ('auto'); leave clips out"
            )
        if name not in PARTS:
            raise ValueError(f"train: there is no part {name!r} to train; choose from {', '.join(PARTS)}")
    if OUTLIERS not in given:
        raise ValueError(
            f"train ({', '.join(given) or 'nothing'}) must name outliers: an adapter is a change of the outlier "
            f"weights, to which {SCALES} and {WEIGHTS} can be added"
        )
    return tuple(part for part in PARTS if part in given)


def adapter_fields(parts: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of an `OutlierLoraConfig` that trains these parts."""
    return {"train_weight_scales": SCALES in parts, "train_weights": WEIGHTS in parts}
