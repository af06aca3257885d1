"""Results that are kept, so that an interrupted evaluation resumes where it stopped and a baseline runs once.

A result is kept under everything that it depends on: the content of the model's files, what was asked, the versions of
the packages that computed. Results are in `$QUAD_EVALUATION_CACHE`, by default `~/.cache/quad_modifiers/evaluation`.
"""

import json
import logging
import os
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from quad_modifiers.output_folder import replace_file, user_path

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "QUAD_EVALUATION_CACHE"
_CHUNK = 2**20  # bytes
_NOT_THE_MODEL = (".md", ".pdf", ".png", ".html", "evaluation.json", "recipe.yaml", "LICENSE")


def cache_folder() -> Path:
    """Returns the folder of the results."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return user_path(named)
    try:
        return Path.home() / ".cache" / "quad_modifiers" / "evaluation"
    except RuntimeError:  # a container's user without a name and a home
        return Path(tempfile.gettempdir()) / "quad_modifiers" / "evaluation"


def read(key: dict[str, Any]) -> Any | None:
    """Returns what was kept under a key, None if there is nothing or it cannot be read."""
    file = _file(key)
    try:
        return json.loads(file.read_text(encoding="utf-8"))["result"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); measuring again", file, error)
        return None


def keep(key: dict[str, Any], result: Any) -> None:
    """Keeps a result, which JSON must be able to hold, under a key. Where it cannot be written, only says so."""
    try:
        replace_file(_file(key), json.dumps({"key": key, "result": result}))
    except OSError as error:
        logger.warning("the result cannot be kept in %s (%s)", cache_folder(), error)


def fingerprint(folder: Path) -> str:
    """Returns the sha256 over names and contents of a checkpoint's files: weights, configs and tokenizer."""
    digest = sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOT_THE_MODEL):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def _file(key: dict[str, Any]) -> Path:
    return cache_folder() / f"{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
