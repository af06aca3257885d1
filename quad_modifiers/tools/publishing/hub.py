"""The Hub: rights, repository, one commit. Every failure becomes a `HubError` (`tools/hub_errors.py`).

Why one commit through `create_commit`, and not `upload_folder` or `upload_large_folder`: nobody ever sees half of a
checkpoint, weight files of an earlier version disappear in the same step, and nothing is left to resume but the
transfers themselves. Those resume either way: with hf-xet (which huggingface_hub prefers) chunks that the storage has
are not sent again, without it whole files are not. `upload_large_folder` is deprecated, and `upload_folder` may split
into several commits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import RevisionNotFoundError

from quad_modifiers.tools.hub_errors import HubError, hub_errors
from quad_modifiers.tools.publishing.card import OUR_TAG

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors.index.json")
_LISTED = 3  # file names in an error message


def check_rights(api: HfApi) -> str:
    """Returns the name of the token's user; the token must be allowed to write.

    Raises:
        HubError: if there is no token, it is not valid, or it may only read.
    """
    with hub_errors("checking the token"):
        user = api.whoami()
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(
            "the token may only read; make one that may write in your settings on the Hub and give it "
            "by `hf auth login`, HF_TOKEN or --token"
        )
    return str(user["name"])


def prepare_repository(api: HfApi, repo_id: str, private: bool, revision: str | None) -> ModelInfo:
    """Creates the repository and the branch where they are missing, and returns what they hold.

    Raises:
        HubError: if they cannot be made, or the repository is public and should be private.
    """
    with hub_errors("creating the repository", repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        try:
            info = api.model_info(repo_id, revision=revision)
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=str(revision))
            info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise HubError(
            f"{repo_id} exists and is public, so this upload would not be private; make it private in its settings on "
            "the Hub, or choose another name"
        )
    return info


def superseded_files(info: ModelInfo, names: set[str], overwrite: bool) -> list[str]:
    """Returns the files in the repository that have to go, so that it holds one checkpoint and not two.

    `names` are about to be uploaded; `overwrite` replaces a model that was not published from here.

    Raises:
        HubError: if the repository holds another model and `overwrite` is false.
    """
    remote = [sibling.rfilename for sibling in info.siblings or []]
    models = [name for name in remote if name == "config.json" or name.endswith(_WEIGHTS)]
    tags = (info.card_data.get("tags") if info.card_data else None) or []
    if models and OUR_TAG not in tags and not overwrite:
        shown = ", ".join(models[:_LISTED]) + (", …" if len(models) > _LISTED else "")
        raise HubError(
            f"{info.id} holds another model already ({shown}); choose another name, or replace it with --overwrite"
        )
    return [name for name in models if name not in names]


def commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    names: Sequence[str],
    superseded: Sequence[str],
    revision: str | None,
    message: str,
    parent: str | None,
    texts: Mapping[str, str],
) -> str:
    """Uploads the files and commits them together; returns the address of the commit.

    The commit deletes the `superseded` paths, and needs the branch to be at the commit `parent` still. Names among
    `texts` have that content, whatever the folder holds.

    Raises:
        HubError: if it does not succeed; the repository is then as it was.
        ValueError: if the Hub refuses the metadata of the card.
    """
    with hub_errors("uploading", repo_id):
        operations = [CommitOperationDelete(name) for name in superseded]
        for name in names:
            content = texts[name].encode() if name in texts else folder / name
            operations.append(CommitOperationAdd(name, content))  # type: ignore[arg-type]
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)
    return str(done.commit_url)
