"""A process that is killed: whatever it was doing, what it finished is not lost, and nothing half-written stays."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.journal import identity_of, note_saving, remove_journal, settle_saving
from quad_modifiers.output_folder import complete_or_absent

from .toy_runs import TEXTS, files_of, recipe_text

pytest.importorskip("llmcompressor")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def killed_at(change: int, work: Callable[[], None]) -> bool:
    """Does something in a process of its own, which is killed at the given change of the files; whether it was."""
    child = os.fork()
    if child == 0:
        changes = itertools.count()

        def kill(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and next(changes) == change:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("exists", [False, True], ids=["new folder", "existing folder"])
def test_killed_before_any_change_of_the_files(exists: bool, tmp_path: Path) -> None:
    """Whatever change was the last one: all of the checkpoint is in its place, or nothing of it anywhere."""
    files = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}

    def save(journal: Path, output: Path) -> None:
        with complete_or_absent(output, announce=partial(note_saving, journal)) as hidden:
            for name, text in files.items():
                (hidden / name).write_text(text)

    settled = set()
    for change in itertools.count():
        folder = tmp_path / str(change)
        journal, output = folder / "out.partial", folder / "out"
        journal.mkdir(parents=True)
        if exists:
            output.mkdir()
        if not killed_at(change, lambda journal=journal, output=output: save(journal, output)):
            break
        whole = settle_saving(journal, output, lambda written: {file.name for file in written.iterdir()} == {*files})
        settled.add(whole)
        kept = {file.name: file.read_text() for file in output.iterdir()} if output.is_dir() else {}
        assert kept == (files if whole else {})
        assert {entry.name for entry in folder.iterdir()} == {"out.partial"} | ({"out"} if whole or exists else set())
    assert settled == {True, False}
    assert change > 10


@needs_fork
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_killed_before_any_change_as_the_journal_goes(tmp_path: Path) -> None:
    """The checkpoint is in its place: whatever is left of the journal, the run is known to have finished."""
    for change in itertools.count():
        output = tmp_path / f"out-{change}"
        journal = output.with_name(f"{output.name}.partial")
        (journal / "01-statistics").mkdir(parents=True)
        for name in ("run.json", "lock", "a", "z", "01-statistics/layer-0000.safetensors"):
            (journal / name).write_text("{}")
        output.mkdir()
        note_saving(journal, tmp_path / ".hidden", True)
        if not killed_at(change, lambda journal=journal: remove_journal(journal)):
            break
        assert settle_saving(journal, output, lambda written: True), [each.name for each in journal.iterdir()]
        assert identity_of(journal) == {}
        remove_journal(journal)
    assert change > 7
    assert not journal.exists()


def test_killed_at_any_moment(toy_checkpoint, tmp_path: Path) -> None:
    """SIGKILL, which nothing can tidy up behind, and SIGTERM."""
    model = toy_checkpoint("llama")
    (tmp_path / "recipe.yaml").write_text(recipe_text("corrected"))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    command = [sys.executable, "-m", "quad_modifiers", "compress", str(model), str(tmp_path / "recipe.yaml")]
    command += ["--dataset", str(tmp_path / "text.txt"), "--samples", "6", "--seq-length", "48", "--no-check", "-o"]

    def finish(output: Path, *more: str) -> None:
        done = subprocess.run([*command, str(output), *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    finish(tmp_path / "whole")
    wanted, drawn = files_of(tmp_path / "whole"), random.Random(0)
    for way in (signal.SIGKILL, signal.SIGTERM):
        output = tmp_path / f"out-{way}"
        partial = output.with_name(f"{output.name}.partial")
        running = subprocess.Popen([*command, str(output)], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not partial.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(drawn.random() * 0.3)
        running.send_signal(way)
        said = running.communicate()[1]
        # With the journal gone it had finished, but for the end of the process, which any signal may hurry.
        if partial.exists() or not output.exists():
            assert running.returncode == (-signal.SIGKILL if way == signal.SIGKILL else 143), said
            finish(output, "--resume")
        assert files_of(output) == wanted
        assert not [each for each in tmp_path.iterdir() if each.name.startswith((f".{output.name}", partial.name))]
