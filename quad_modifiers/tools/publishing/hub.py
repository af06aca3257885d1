"""The Hub: rights, repository, one commit. Every failure becomes a `HubError` of one line with the remedy.

Why one commit through `create_commit`, and not `upload_folder` or `upload_large_folder`: nobody ever sees half of a
checkpoint, weight files of an earlier version disappear in the same step, and nothing is left to resume but the
transfers themselves. Those resume either way: with hf-xet (which huggingface_hub prefers) chunks that the storage has
are not sent again, without it whole files are not. `upload_large_folder` is deprecated, and `upload_folder` may split
into several commits.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from quad_modifiers.tools.publishing.card import OUR_TAG

_SAME_AGAIN = "run the same command again: what was uploaded completely is not sent again"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors.index.json")
_LISTED = 3  # file names in an error message


class HubError(RuntimeError):
    """The Hub refused or could not be reached; the message says what to do."""


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


@contextmanager
def hub_errors(doing: str, repo_id: str = "") -> Iterator[None]:
    """Turns what huggingface_hub and the network raise into `HubError`."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is not a name for a repository: {error}") from error
    except json.JSONDecodeError as error:
        raise HubError(f"{doing} failed: the answer is not the Hub's; check HF_ENDPOINT and proxies") from error
    except (OSError, RuntimeError, httpx.HTTPError) as error:
        raise HubError(f"{doing} failed: {_explain(_root(error), repo_id)}") from error


def _root(error: BaseException) -> BaseException:
    """Returns the network error that caused an error; huggingface_hub wraps that of a file in a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(error: BaseException, repo_id: str) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in with `hf auth login`, set HF_TOKEN, or give --token"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to publish"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id)
    if "/xet-write-token/" in str(error):
        return (
            "the Hub gives no access to its Xet storage; if it has none, as Hubs of one's own may not, set "
            f"HF_HUB_DISABLE_XET=1, then {_SAME_AGAIN}"
        )
    if isinstance(error, (httpx.TransportError, ConnectionError)):
        return f"the connection was lost ({str(error) or type(error).__name__}); {_SAME_AGAIN}"
    return f"{' '.join(str(error).split()) or type(error).__name__}; {_SAME_AGAIN}"


_STATUS = {
    401: "the Hub does not accept the token{said}; log in again with `hf auth login`, or make a new token",
    403: "the token may not write to {repo}{said}; use a token with write access to {namespace}, or another name",
    404: "{repo} is not there, or the token may not see it{said}; check the name and the token's rights",
    409: "{repo} was changed in the meantime{said}; look at it, then {again}",
    412: "{repo} was changed in the meantime{said}; look at it, then {again}",
    429: "too many requests{said}; wait {wait}, then {again}",
    500: "the Hub has a problem (status {status}){said}; wait a little, then {again}",
}


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status, wait = error.response.status_code, error.response.headers.get("Retry-After")
    explanation = _STATUS.get(min(status, 500), "the Hub refused with status {status}{said}")
    return explanation.format(
        status=status,
        said=f" ({' '.join(error.server_message.split())})" if error.server_message else "",
        repo=repo_id,
        namespace=repo_id.partition("/")[0],
        wait=f"{wait} s" if wait else "a few minutes",
        again=_SAME_AGAIN,
    )
