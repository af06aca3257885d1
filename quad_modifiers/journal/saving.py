"""A checkpoint that was being written when a run ended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from quad_modifiers.journal.unfinished import RUN, locked
from quad_modifiers.output_folder import put_in_place, replace_file

_SAVING = "saving.json"


def note_saving(journal_folder: Path, hidden: Path, is_complete: bool) -> None:
    """Notes where a checkpoint is written before it gets its name, and whether all of it is there."""
    replace_file(journal_folder / _SAVING, json.dumps({"hidden": str(hidden), "complete": is_complete}) + "\n")


def settle_saving(journal_folder: Path, output: Path, is_whole: Callable[[Path], bool]) -> bool:
    """Puts a complete checkpoint of an earlier run in its place, and removes one that is not complete.

    Args:
        journal_folder: the journal of the run that is resumed.
        output: where the checkpoint goes.
        is_whole: tells whether a folder holds what was written.

    Returns:
        Whether `output` is complete: the run had ended but for the removal of its journal.

    Raises:
        FileExistsError: if another process works on that run.
        OSError: if the checkpoint cannot be put in its place.
    """
    file = journal_folder / _SAVING
    if not file.is_file():
        if not journal_folder.is_dir() or any(journal_folder.iterdir()):
            return False
        return output.is_dir() and is_whole(output)  # cut off as the last thing of all was to be done
    with locked(journal_folder):
        noted = json.loads(file.read_text(encoding="utf-8"))
        hidden = Path(noted["hidden"])
        if not noted["complete"]:
            shutil.rmtree(hidden, ignore_errors=True)
            return False
        if hidden.is_dir():
            put_in_place(hidden, output, begun=True)
        return output.is_dir() and is_whole(output)


def remove_journal(journal_folder: Path) -> None:
    """Removes the journal of a run that has finished; what says so goes last, should the process end meanwhile."""
    last = (RUN, _SAVING)
    for entry in sorted(
        journal_folder.iterdir(), key=lambda entry: last.index(entry.name) if entry.name in last else -1
    ):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    journal_folder.rmdir()
