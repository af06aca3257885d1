"""Where a model lies: in a folder of this machine, looked at before anything is loaded from it, or on the Hub."""

import json
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin")


def model_folder(model: str | Path) -> Path | None:
    """Returns the folder of a model, None for a Hub id.

    A string is a Hub id if no folder has that name and it has the form OWNER/NAME, OWNER being no folder either.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no config.json.
        ValueError: if its config.json is damaged.
    """
    text = str(model)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        local = isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1
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
    except ValueError as error:  # no UTF-8, or no JSON
        raise ValueError(f"{config} is damaged ({error}); fetch or write the model again") from error
    if not readable:
        raise ValueError(f"{config} is damaged (no JSON object); fetch or write the model again")
    return folder


def check_weights(model: str | Path) -> None:
    """Checks that there is a file of weights in a folder; of a Hub id nothing is known.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(model)
    if folder.is_dir() and not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise FileNotFoundError(f"{folder} has a config.json but no weights; fetch or write the model again")


def tokenizer_of(name: str) -> Any:
    """Returns the tokenizer of a folder or Hub id.

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
