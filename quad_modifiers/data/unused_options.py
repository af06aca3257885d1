"""Refuses the choice of a column, split or configuration where a source has none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quad_modifiers.data.local_files import DEFAULT_COLUMN

_WITHOUT_COLUMNS = (".txt", ".md")


def check_column_used(source: Any, text_column: str) -> None:
    """Refuses a text column that a source does not have a place for.

    Raises:
        ValueError: if one is named, and `source` is the default text, a plain text file or no table.
    """
    if text_column != DEFAULT_COLUMN and not _is_table(source):
        _refuse("text_column", text_column, source)


def check_choices_used(source: Any, choices: Mapping[str, Any], is_file: bool) -> None:
    """Refuses options that choose a part of a data set from `datasets` where the source is none.

    Args:
        source: the data set, as `calibration_windows` takes it.
        choices: values by the caller's names of the options: first the split, then the configuration.
        is_file: whether `source` names a local file.
    """
    split, configuration = choices.items()
    named = isinstance(source, (str, Path)) and not is_file
    if split[1] is not None and not named and not isinstance(source, dict):
        _refuse(*split, source)
    if configuration[1] is not None and not named:
        _refuse(*configuration, source)


def _is_table(source: Any) -> bool:
    if isinstance(source, (str, Path)):
        return Path(source).suffix.lower() not in _WITHOUT_COLUMNS
    return isinstance(source, dict) or hasattr(source, "column_names")


def _refuse(option: str, value: Any, source: Any) -> None:
    what = "the default text" if source is None else f"a {type(source).__name__}"
    if isinstance(source, (str, Path)):
        what = str(source)
    raise ValueError(f"{option}={value!r} has no effect on {what}; omit it, or name the data set that it belongs to")
