"""The folder of a run that is not finished: where it is, and which run it belongs to."""

import json
import os
from pathlib import Path
from typing import IO, Any

from quad_modifiers.output_folder import may_write, replace_file

LOCK = "lock"
RUN = "run.json"


def unfinished_folder(output: Path, ending: str) -> Path:
    """Returns where the states of a run are kept until its `output` is complete: beside it, with another ending.

    It is inside of an output that exists in a folder that cannot be written to. A target that is a link, or the current
    folder, has its real name.
    """
    real = Path(os.path.realpath(output))
    name = f"{real.name}{ending}"
    return real / name if real.is_dir() and not may_write(real.parent) else real.with_name(name)


def is_unfinished(folder: Path) -> bool:
    """Returns whether a folder holds a run that has something to go on with."""
    return (folder / RUN).is_file() and any(each.name not in (RUN, LOCK) for each in folder.iterdir())


def check_absent(folder: Path, resume: bool) -> None:
    """Refuses to begin anew where a run that could be resumed, or something else, is in the way.

    Raises:
        FileExistsError: if the folder holds an unfinished run and `resume` is False, or is no run's.
    """
    if is_unfinished(folder):
        if not resume:
            raise FileExistsError(f"{folder} holds an unfinished run; go on with --resume (resume=True), or remove it")
    elif not (folder / RUN).is_file() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is no unfinished run; move it away, or choose another output")


def open_unfinished(folder: Path, identity: dict[str, Any], resume: bool) -> None:
    """Makes the folder of a run, or checks that the one there is the same run.

    Args:
        folder: from `unfinished_folder`.
        identity: what an interrupted run and the one that resumes it must have in common, as JSON takes it.
        resume: whether a run that is there may be gone on with.

    Raises:
        FileExistsError: as `check_absent`.
        ValueError: if the run that is there is another one, naming in what they differ.
    """
    check_absent(folder, resume)
    file = folder / RUN
    if not is_unfinished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(identity, indent=1) + "\n")
        return
    found, wanted = identity_of(folder), json.loads(json.dumps(identity))
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"the unfinished run in {folder} had another {', another '.join(differing)} ({key} {found.get(key)}, now "
            f"{wanted.get(key)}); give the same, or remove the folder to start anew"
        )


def locked(folder: Path) -> IO[str]:
    """Returns the lock of a run's folder, held until it is closed or the process ends, however it ends.

    Raises:
        FileExistsError: if another process holds it.
    """
    handle = (folder / LOCK).open("w")
    try:
        import fcntl
    except ImportError:  # pragma: no cover - not on Windows
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise FileExistsError(f"another process works in {folder}; wait for it, or end it") from error
    except OSError:  # a network file system without locks
        return handle
    return handle


def identity_of(folder: Path) -> dict[str, Any]:
    """Returns what the run in a folder was made from, as `open_unfinished` was told; empty if it does not say."""
    file = folder / RUN
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
