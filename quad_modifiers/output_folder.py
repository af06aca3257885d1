"""Guards of what is written: checked before the work, complete or absent after it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(folder: Path) -> None:
    """Checks that a folder can be written as `folder`.

    Raises:
        FileExistsError: if it exists and is not empty.
        NotADirectoryError: if it, or what should hold it, is a file.
        PermissionError: if what should hold it cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; remove it or choose another output folder")
    check_parent(folder)


def check_parent(path: Path) -> None:
    """Checks that something can be written as `path`, whose parents need not exist yet.

    Raises:
        NotADirectoryError: if one of the parents is a file.
        PermissionError: if the nearest parent that exists cannot be written to.
    """
    parent = _existing_parent(path)
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is a file; choose another output")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise PermissionError(f"{path} cannot be written: {parent}: {reason}; choose another output") from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def check_space(folder: Path, size: int) -> None:
    """Checks that a checkpoint of `size` bytes fits on the disk of `folder`, which need not exist yet.

    Raises:
        OSError: with the space that is free and the space needed.
    """
    existing = _existing_parent(folder)
    free = shutil.disk_usage(existing).free
    if free < size * 1.01 + 2**20:
        raise OSError(f"{existing} has {free / 1e9:.2f} GB free, the checkpoint needs up to {size / 1e9:.2f} GB")


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` if the block succeeds and vanishes if it does not."""
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_file(file: Path, text: str) -> None:
    """Writes a file by way of a temporary one beside it: whoever reads it finds the old text or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
