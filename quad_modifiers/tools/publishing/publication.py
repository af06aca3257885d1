"""`publish`: from a checkpoint folder to a repository on the Hub."""

import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url

from quad_modifiers.records.checksums import damages, read_checksums, refuse_damages
from quad_modifiers.records.evaluation_record import read_evaluation
from quad_modifiers.tools.hub_errors import hub_errors
from quad_modifiers.tools.publishing.base_license import UNKNOWN, License, find_license
from quad_modifiers.tools.publishing.card import build_card, read_card, write_card
from quad_modifiers.tools.publishing.contents import CARD_NAME, check_contents, files_to_publish
from quad_modifiers.tools.publishing.hub import check_rights, commit, prepare_repository, superseded_files
from quad_modifiers.tools.publishing.stranger import Impression, check_as_stranger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The files and the card of a publication that has not been made."""

    repo_id: str  # "org/name"
    files: tuple[tuple[str, int], ...]  # path in the repository and bytes
    card: str  # text of README.md
    license: License  # license of the base model, as far as it was found
    base_model: str | None  # Hub id of the original, if known
    impression: Impression | None  # observations of the stranger's check; None if it was skipped

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Published:
    """A finished publication."""

    repo_id: str  # "org/name"
    url: str  # address of the repository
    commit_url: str  # address of the commit
    plan: Plan  # plan that was carried out
    removed: tuple[str, ...]  # files of an earlier checkpoint that the commit deleted


def plan(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    check: bool = True,
    needs_tokenizer: bool = True,
) -> Plan:
    """Checks a checkpoint folder and returns what `publish` would upload. Writes and uploads nothing.

    The Hub is asked for nothing but the license of `base_model`, and only if neither argument, folder nor cache have
    it; without a connection the license is unknown. The arguments are those of `publish`; the name must be "org/name",
    and a token is needed only for a base model that is not public.

    Raises:
        FileNotFoundError, ValueError: naming what is missing, damaged or misspelt, with the remedy.
    """
    folder = Path(folder).expanduser()
    _check_name(repo_id)
    if base_model is not None:
        if base_model.count("/") > 1 or Path(base_model).expanduser().is_dir():
            raise ValueError(
                f"the base model must be a Hub id such as Qwen/Qwen2.5-0.5B, not the folder {base_model!r}"
            )
        _check_name(base_model)
    inventory = check_contents(folder, needs_tokenizer)
    _check_sums(folder)
    evaluation = read_evaluation(folder)
    own, _ = read_card(folder / CARD_NAME)
    base_model = base_model or _base_of(own.get("base_model"))
    found = find_license(license, own, base_model, HfApi(token=token))
    card = build_card(folder, inventory, repo_id, base_model, found, evaluation)
    impression = check_as_stranger(folder) if check else None
    sizes = {str(file.relative_to(folder).as_posix()): file.stat().st_size for file in files_to_publish(folder)}
    sizes[CARD_NAME] = len(card.encode())
    if base_model is None:
        logger.warning("the base model is not known, so the card does not name it; give --base-model")
    if found.identifier == UNKNOWN:
        logger.warning("the license of the base model was not found, the card says so; give --license if you know it")
    return Plan(repo_id, tuple(sorted(sizes.items())), card, found, base_model, impression)


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    needs_tokenizer: bool = True,
) -> Published:
    """Publishes a checkpoint: checks the folder, writes its model card, creates the repository, uploads.

    The upload is one commit: it succeeds as a whole or leaves the repository as it was. Interrupted, it is resumed by
    the same call; what the storage has already is not sent again.

    Args:
        folder: a checkpoint. Its README.md is written, or updated between our markers.
        repo_id: "org/name"; "name" alone means the user's own namespace.
        private: True to create a private repository; one that exists and is public is refused.
        base_model: Hub id of the original model; that of the card in the folder by default.
        license: license of the original, an identifier of the Hub such as "apache-2.0"; looked up by default.
        token: token of the Hub; by default the environment's (HF_TOKEN) or that of `hf auth login`.
        revision: branch, made if it is missing; main by default.
        message: first line of the commit message.
        check: True to load the checkpoint in a fresh process first (`check_as_stranger`).
        overwrite: True to replace another model that the repository holds. A checkpoint published from here is always
            replaced; its weight files that are not part of the new one are deleted.
        needs_tokenizer: True to refuse a folder without a tokenizer.

    Raises:
        FileNotFoundError, ValueError: naming what is wrong in the folder or the arguments.
        HubError: naming what the Hub refused or why it could not be reached, with the remedy.
    """
    folder = Path(folder).expanduser()
    check_contents(folder, needs_tokenizer)  # cheap, and needs no token
    api = HfApi(token=token)
    user = check_rights(api)
    if "/" not in repo_id:
        repo_id = f"{user}/{repo_id}"
    model = {"base_model": base_model, "license": license, "token": token}
    planned = plan(folder, repo_id, **model, check=check, needs_tokenizer=needs_tokenizer)
    info = prepare_repository(api, repo_id, private, revision)
    names = [name for name, _ in planned.files]
    removed = superseded_files(info, set(names), overwrite)
    try:
        write_card(folder, planned.card)
    except OSError as error:
        logger.warning("the model card cannot be kept in %s (%s); it is uploaded all the same", folder, error.strerror)
    message = message or f"Publish {repo_id.rpartition('/')[2]} with quad-modifiers"
    url = commit(api, repo_id, folder, names, removed, revision, message, info.sha, {CARD_NAME: planned.card})
    return Published(repo_id, f"{api.endpoint}/{repo_id}", url, planned, tuple(removed))


def _check_sums(folder: Path) -> None:
    """Refuses weights or a config that have changed since they were written; names other files, which people edit.

    A folder from before there were checksums is taken as it is.
    """
    wanted = read_checksums(folder)
    if wanted is None:
        return
    found = damages(folder, wanted)
    refuse_damages(folder, [damage for damage in found if damage.file in (None, "config.json")])
    for damage in found:
        logger.warning("%s since the checkpoint was written", damage.text)


def _check_name(repo_id: str) -> None:
    """Refuses what cannot be a repository, by building an address with it."""
    with hub_errors("checking the name", repo_id):
        hf_hub_url(repo_id, CARD_NAME)


def _base_of(value: object) -> str | None:
    """Returns `base_model` of a card: an id, or a list of them."""
    if isinstance(value, list):
        value = value[0] if value else None
    return str(value) if value else None
