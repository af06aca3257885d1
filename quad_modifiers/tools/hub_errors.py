"""What goes wrong with the Hub: every failure becomes a `HubError` of one line with the remedy."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

SAME_AGAIN = "run the same command again: what was uploaded completely is not sent again"


class HubError(RuntimeError):
    """The Hub refused or could not be reached; the message says what to do."""


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
            f"HF_HUB_DISABLE_XET=1, then {SAME_AGAIN}"
        )
    if isinstance(error, (httpx.TransportError, ConnectionError)):
        return f"the connection was lost ({str(error) or type(error).__name__}); {SAME_AGAIN}"
    return f"{' '.join(str(error).split()) or type(error).__name__}; {SAME_AGAIN}"


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
        again=SAME_AGAIN,
    )
