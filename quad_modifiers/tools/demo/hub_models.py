"""The demonstration models as their authors released them, from the Hugging Face Hub: pinned commit, checked files."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from quad_modifiers.tools.hub_errors import HubError, hub_errors

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds until the Hub counts as out of reach


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: bytes, and digest where it is known beforehand; otherwise the Hub's own is taken."""

    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class HubModel:
    """A model at one commit of its repository.

    Attributes:
        repo_id: OWNER/NAME.
        revision: commit.
        files: what is downloaded.
    """

    repo_id: str
    revision: str
    files: dict[str, HubFile]


# Sizes and digests are those of the commit. Of the small files of the second model the commit alone is pinned.
HUB_MODELS = {
    "smollm2": HubModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        {
            "config.json": HubFile(861, "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a"),
            "generation_config.json": HubFile(132, "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013"),
            "model.safetensors": HubFile(
                269_060_552, "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
            ),
            "special_tokens_map.json": HubFile(655, "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52"),
            "tokenizer.json": HubFile(2_104_556, "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"),
            "tokenizer_config.json": HubFile(3_764, "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df"),
        },
    ),
    "qwen": HubModel(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "ea3f2471cf1b1f0db85067f1ef93848e38e88c25",
        {
            "config.json": HubFile(),
            "generation_config.json": HubFile(),
            "model.safetensors": HubFile(988_097_824),
            "tokenizer.json": HubFile(),
            "tokenizer_config.json": HubFile(),
        },
    ),
}


def download(model: HubModel, folder: Path) -> None:
    """Downloads a model into a new folder and checks every file.

    Raises:
        HubError: if the Hub cannot be reached, or refuses.
        ValueError: if a file is not the one that was pinned.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors(f"fetching {model.repo_id}", model.repo_id):
        api = HfApi()
        info = api.model_info(model.repo_id, revision=model.revision, timeout=_TIMEOUT, files_metadata=True)
    announced = {each.rfilename: each for each in info.siblings or ()}
    missing = sorted(model.files.keys() - announced.keys())
    if missing:
        raise HubError(f"{model.repo_id} at {model.revision} has no {', '.join(missing)}")
    logger.info("Downloading %s from the Hub, commit %s", model.repo_id, info.sha)
    for name, expected in model.files.items():
        with hub_errors(f"downloading {name}", model.repo_id):
            hf_hub_download(model.repo_id, name, revision=model.revision, local_dir=folder)
        lfs = announced[name].lfs
        _check(folder / name, expected, None if lfs is None else lfs.sha256)


def _check(file: Path, expected: HubFile, announced: str | None) -> None:
    """Refuses a file that is not the pinned one, or, where no digest was pinned, not the one the Hub announced."""
    size, wanted = file.stat().st_size, expected.sha256 or announced
    if expected.size is not None and size != expected.size:
        raise ValueError(f"{file.name} from the Hub has {size} bytes, expected {expected.size}; try again")
    if wanted is None:  # a small file, which the commit pins by itself
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        return
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wanted:
        raise ValueError(f"{file.name} from the Hub has sha256 {digest}, expected {wanted}; try again")
