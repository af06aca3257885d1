"""The journal of a run: its steps, in a folder beside the output that vanishes once the output is complete."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from quad_modifiers.journal.saving import remove_journal
from quad_modifiers.journal.shared_step import SharedStep
from quad_modifiers.journal.step import Step
from quad_modifiers.journal.unfinished import LOCK, RUN, is_unfinished, locked, open_unfinished
from quad_modifiers.output_folder import replace_file
from quad_modifiers.ranks import ranks

logger = logging.getLogger(__name__)

_START = "start.json"
_NO_RESULTS = (RUN, LOCK, _START)


class Journal:
    """What is finished of a run.

    The folder is made when there is something to keep: a run that fails before that leaves nothing.

    Args:
        folder: from `unfinished_folder`.
        identity: what must be the same when the run is resumed, as JSON takes it.
        resume: whether a run that is there is gone on with.

    Raises:
        FileExistsError: if an unfinished run is there and `resume` is False, or another process works on it.
        ValueError: if the run that is there is another one, naming in what they differ.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool) -> None:
        self.folder, self._identity = folder, identity
        self._steps = 0
        self._lock: IO[str] | None = None
        self._given_up = False
        self._is_ours = False  # made or locked by this process
        if is_unfinished(folder):
            open_unfinished(folder, identity, resume)
            self._lock = locked(folder)
            self._is_ours = True

    @property
    def has_something(self) -> bool:
        """Whether there is anything to go on with."""
        return any(path.is_file() and path.name not in _NO_RESULTS for path in self.folder.rglob("*"))

    def step(self, name: str, start: str | None = None) -> Step:
        """Returns the next step of the run, with the layers that are finished.

        Args:
            name: short, for the folder.
            start: digest of what the step begins with, which is computed again when the run is resumed.

        Raises:
            ValueError: if the finished layers belong to another start.
        """
        self._steps += 1
        folder = self.folder / f"{self._steps:02d}-{name}"
        file = folder / _START
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found != start:
                raise ValueError(
                    f"{folder} was begun with other weights: what comes before it has not given the same values again "
                    "(another processor, or number of threads?); remove the folder to start anew"
                )
        elif folder.is_dir():
            shutil.rmtree(folder)  # cut off while it was made
        step = Step(folder, lambda write: self._try(lambda: _begun(file, start), write))
        if step.done:
            logger.info("going on behind layer %d of %s, from %s", step.done, name, self.folder)
        return step

    def inner_folder(self, name: str) -> Path | None:
        """Returns a folder of the journal for what keeps states of its own; None if there can be none."""
        folder = self.folder / name
        return folder if self._try(lambda: folder.mkdir(exist_ok=True)) else None

    def remove(self) -> None:
        """Removes the folder, if it is this run's."""
        if self._is_ours:
            with suppress(OSError):
                remove_journal(self.folder)
        if self._lock is not None:
            self._lock.close()

    def close(self) -> None:
        """Lets another process go on; a folder in which nothing is finished is removed."""
        if not self.has_something:
            self.remove()
        elif self._lock is not None:  # else it is another's
            self._lock.close()
            logger.warning("what is finished is in %s; --resume (resume=True) goes on from there", self.folder)

    def _try(self, *writes: Callable[[], None]) -> bool:
        """Writes, or warns once and never tries again: a full disk is no reason to end a run."""
        if self._given_up:
            return False
        try:
            if self._lock is None:
                self._is_ours = not self.folder.exists()
                open_unfinished(self.folder, self._identity, False)
                self._lock = locked(self.folder)
                self._is_ours = True
            for write in writes:
                write()
        except OSError as error:
            self._given_up = True
            logger.warning(
                "the run goes on, but could not be resumed from here: %s", " ".join(f"{self.folder}: {error}".split())
            )
            return False
        return True


_current: ContextVar[Journal | None] = ContextVar("_current", default=None)


@contextmanager
def journaled(journal: Journal | None) -> Iterator[Journal | None]:
    """Keeps what the steps inside finish in `journal`; it is removed if all ends well, and named if it does not."""
    token = _current.set(journal)
    try:
        yield journal
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    else:
        if journal is not None:
            journal.remove()
    finally:
        _current.reset(token)


def open_step(name: str, start: Callable[[], str] | None = None) -> Step:
    """Returns the next step of the run's journal; without a journal one that keeps nothing.

    Args:
        name: short, for a folder.
        start: returns a digest of what the step begins with.

    Raises:
        ValueError: as `Journal.step`.
    """
    journal, step = _current.get(), Step(None, lambda write: False)
    if journal is not None:
        step = journal.step(name, None if start is None else start())
    if ranks().size == 1:
        return step
    return SharedStep(step if ranks().is_first else None)


def folder_in_journal(name: str) -> Path | None:
    """Returns a folder of the run's journal for what keeps states of its own; None without a journal."""
    journal = _current.get()
    return None if journal is None else journal.inner_folder(name)


def _begun(file: Path, start: str | None) -> None:
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        replace_file(file, json.dumps(start) + "\n")
