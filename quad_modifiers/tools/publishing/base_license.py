"""The license of the base model, from which that of a quantized model follows."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"  # an identifier that the Hub knows


@dataclass(frozen=True)
class License:
    """A license as the Hub's metadata name it; `name` and `link` go with the identifier "other"."""

    identifier: str  # identifier of the Hub, such as "apache-2.0"
    name: str | None = None  # name of a license that has no identifier
    link: str | None = None  # link to the text of the license
    source: str = ""  # place where the license was found, for readers


def find_license(given: str | None, own: dict[str, Any], base_model: str | None, api: HfApi) -> License:
    """Returns the first license found: the given identifier, the folder's own card, the base model's card.

    The base model's card is looked for in the Hub's cache on this machine, then on the Hub. If nothing is found,
    the license is "unknown".
    """
    if given:
        return License(given, source="argument")
    if own.get("license") not in (None, UNKNOWN):
        return _from_metadata(own, "the card in the folder")
    if base_model:
        metadata = _cached_metadata(base_model) or _hub_metadata(base_model, api)
        if metadata.get("license"):
            return _from_metadata(metadata, f"the card of {base_model}")
    return License(UNKNOWN)


def _from_metadata(metadata: dict[str, Any], source: str) -> License:
    identifier = metadata["license"]
    if isinstance(identifier, list):
        identifier = identifier[0]
    return License(str(identifier), metadata.get("license_name"), metadata.get("license_link"), source)


def _cached_metadata(base_model: str) -> dict[str, Any]:
    cached = try_to_load_from_cache(base_model, "README.md")
    if not isinstance(cached, str):
        return {}
    try:
        return ModelCard(Path(cached).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except ValueError:
        return {}


def _hub_metadata(base_model: str, api: HfApi) -> dict[str, Any]:
    try:
        data = api.model_info(base_model, timeout=10).card_data
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        logger.warning("the card of %s cannot be read (%s)", base_model, " ".join(str(error).split())[:120])
        return {}
    return data.to_dict() if data is not None else {}
