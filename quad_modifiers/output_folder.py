"""Guards of what is written: checked before the work, complete or absent after it.

A new folder is written under a hidden name beside its place and renamed when it is complete. A folder that exists is
kept as it is, because it may be a mount point, the end of a link, the current folder, or belong to a group: what it is
to hold is written into a hidden folder inside of it, then moved file by file, the file that makes it a checkpoint last.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A reader looks for these first: without them a folder is no checkpoint, adapter or report.
_ENTRY_FILES = ("report.html", "adapter_config.json", "config.json")
_OF_THE_FILE_SYSTEM = frozenset(("lost+found", ".snapshot"))  # in a fresh volume


def user_path(path: str | Path) -> Path:
    """Returns a path that somebody gave, with `~` as the home folder, as a shell would read it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a folder of that name, to a shell as well
        return Path(path)


def may_write(path: Path) -> bool:
    """Returns whether this process may write to a file, or make entries in a folder."""
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def check_target(folder: Path, besides: Collection[str] = ()) -> None:
    """Checks that a folder can be written as `folder`, by making and removing the hidden one.

    Args:
        folder: the target.
        besides: names of entries that may be in it.

    Raises:
        FileExistsError: if it exists and is not empty.
        NotADirectoryError: if it, or what should hold it, is a file.
        PermissionError: if what should hold it cannot be written to.
    """
    real = _real(folder)
    _check_empty(folder, real, besides)
    with rehearsal(folder):
        pass


def check_parent(path: Path) -> None:
    """Checks that a file can be written as `path`, whose parents need not exist yet.

    Raises:
        NotADirectoryError: if one of the parents is a file.
        PermissionError: if the nearest parent that exists cannot be written to.
    """
    real = _real(path)
    if not _is_written_in_place(real):
        with rehearsal(path):
            pass


@contextmanager
def rehearsal(path: Path) -> Iterator[Path]:
    """Yields an empty folder where that of `path` will be made, for trying what will be written; it is removed.

    Raises:
        NotADirectoryError: if a parent of `path` is a file.
        PermissionError: if nothing can be written there.
    """
    with _naming_what_cannot_be_written(path):
        temporary = _hidden(_place_of(path), _real(path).name)
        temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_place(path: Path) -> Path:
    """Returns the folder that exists in which that of `path` is or will be made, or `path` itself if it exists."""
    real = _real(path)
    return real if real.is_dir() else _existing_parent(real)


def check_space(folder: Path, size: int) -> None:
    """Checks that a checkpoint of `size` bytes fits on the disk of `folder`, which need not exist yet.

    Some network file systems do not say how much is free: what they cannot tell is no reason to refuse.

    Raises:
        OSError: with the space that is free and the space needed.
    """
    existing = existing_place(folder)
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return
    free = usage.free
    if free == 0 and usage.total == 0:
        return
    if free < size * 1.01 + 2**20:
        raise OSError(f"{existing} has {free / 1e9:.2f} GB free, the checkpoint needs up to {size / 1e9:.2f} GB")


@contextmanager
def complete_or_absent(
    folder: Path, besides: Collection[str] = (), announce: Callable[[Path, bool], None] | None = None
) -> Iterator[Path]:
    """Yields a temporary folder whose files become those of `folder` if the block succeeds and vanish if it does not.

    Files and folders get the modes that the umask and the place give.

    Args:
        folder: must not exist or be empty.
        besides: names of entries that may be in it.
        announce: is told the temporary folder and whether it is complete, before it is made and before it is put in
            place, so that it can be found whatever ends the process.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: as `check_target`, before the block.
        OSError: if `folder` was taken while the block ran; it names where the complete files are.
    """
    real = _real(folder)
    _check_empty(folder, real, besides)
    with _naming_what_cannot_be_written(folder):
        _place_of(folder)
    fills = real.is_dir()
    temporary = _hidden(real if fills else real.parent, real.name)
    if announce is not None:
        announce(temporary, False)
    made: list[Path] = []
    try:
        with _naming_what_cannot_be_written(folder):
            made = [] if fills else _make_parents(real.parent)
            temporary.mkdir()
        try:
            yield temporary
            give_usual_modes(temporary)
            if announce is not None:
                announce(temporary, True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        put_in_place(temporary, folder, besides)
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # not empty: somebody else writes there
                parent.rmdir()
        raise


def put_in_place(temporary: Path, folder: Path, besides: Collection[str] = (), begun: bool = False) -> None:
    """Makes `temporary`, which lies in `folder` if that exists and beside it if not, what `folder` holds.

    Args:
        temporary: complete files.
        folder: the target.
        besides: names of entries that may be in it.
        begun: True if some of the files may be there already.

    Raises:
        OSError: if `folder` cannot be written or was taken meanwhile; it names where the complete files are.
    """
    real = _real(folder)
    try:
        if temporary.parent != real:
            temporary.rename(real)
            return
        if not begun:
            _check_empty(folder, real, (temporary.name, *besides))
        move_entries(temporary, real)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"{folder} cannot be written any more ({reason}); what it was to hold is in {temporary}"
        ) from error


def move_entries(source: Path, target: Path) -> None:
    """Moves what a folder holds into another one, config.json last; all of it or nothing. The source is removed."""
    order = {name: place for place, name in enumerate(_ENTRY_FILES, start=1)}
    moved: list[str] = []
    try:
        for name in sorted((entry.name for entry in source.iterdir()), key=lambda name: (order.get(name, 0), name)):
            (source / name).rename(target / name)
            moved.append(name)
    except BaseException:
        for name in reversed(moved):
            (target / name).rename(source / name)
        raise
    source.rmdir()


def give_usual_modes(folder: Path, pattern: str = "*") -> None:
    """Gives what is in a folder, of names that match `pattern`, the modes that new files and folders get there.

    safetensors and `tempfile` make files that only their owner can read, and a copy keeps the mode of its source.
    """
    probe = folder / f".{secrets.token_hex(4)}"
    probe.touch()
    of_files = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    probe.mkdir()
    of_folders = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    for path in folder.rglob(pattern):
        mode = of_folders if path.is_dir() else of_files
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


@contextmanager
def file_complete_or_absent(file: Path) -> Iterator[Path]:
    """Yields a path beside `file` that takes its place if the block succeeds and vanishes if it does not.

    Whoever reads the file finds the old content or the new. Behind a link, the file that it leads to is replaced. A
    file that was there keeps its mode, a new one gets the usual one.
    """
    real = _real(file)
    real.parent.mkdir(parents=True, exist_ok=True)
    temporary = real.with_name(f".{real.name[:60]}.{secrets.token_hex(4)}")
    temporary.touch()
    try:
        mode = stat.S_IMODE((real if real.exists() else temporary).stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            with suppress(OSError):
                temporary.chmod(mode)
        temporary.replace(real)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(file: Path, text: str) -> None:
    """Writes a text file, complete or not at all; a device, and a file in a read-only folder, are written in place."""
    real = _real(file)
    if _is_written_in_place(real):
        with real.open("w", encoding="utf-8") as stream:
            stream.write(text)
        return
    with file_complete_or_absent(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _existing_parent(real: Path) -> Path:
    return next(parent for parent in real.parents if os.path.lexists(parent))


def _check_empty(folder: Path, real: Path, besides: Collection[str]) -> None:
    if real.is_dir():
        held = min({entry.name for entry in real.iterdir()} - _OF_THE_FILE_SYSTEM - {*besides}, default=None)
        if held is not None:
            raise FileExistsError(
                f"{folder} exists and is not empty; remove it or choose another output folder (it holds {held})"
            )
    elif real.is_symlink():
        raise NotADirectoryError(f"{folder} is a link that leads in a circle; choose a folder")
    elif real.exists():
        raise NotADirectoryError(f"{folder} is a file; choose a folder")


def _place_of(path: Path) -> Path:
    """Returns the folder that exists in which that of `path` is to be made, or `path` itself if it exists.

    Raises:
        NotADirectoryError: if it is a file.
        OSError: if a folder that is missing cannot have its name here.
    """
    real, place = _real(path), existing_place(path)
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {place} is a file; choose another output")
    for part in real.relative_to(place).parts:
        with suppress(FileNotFoundError):
            os.lstat(place / part)  # a name that is too long, or has no place on this file system
    return place


@contextmanager
def _naming_what_cannot_be_written(path: Path) -> Iterator[None]:
    try:
        yield
    except NotADirectoryError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise PermissionError(
            f"{path} cannot be written: {existing_place(path)}: {reason}; choose another output"
        ) from error


def _hidden(place: Path, name: str) -> Path:
    """Returns the name of a new folder; `mkdir` gives it the usual mode, which `tempfile` would not."""
    return place / f".{name[:60]}.{secrets.token_hex(4)}"


def _make_parents(parent: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were missing, outermost first."""
    missing = [each for each in (parent, *parent.parents) if not each.exists()][::-1]
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _is_written_in_place(real: Path) -> bool:
    """Returns whether a file can be written, but not another one in its place."""
    if not real.exists() or real.is_dir() or not may_write(real):
        return False
    return not real.is_file() or not may_write(real.parent)
