"""Folders and files that are written: complete or absent, wherever they are and whoever may read them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quad_modifiers.output_folder import (
    check_parent,
    check_space,
    check_target,
    complete_or_absent,
    file_complete_or_absent,
    replace_file,
    user_path,
)


def write(folder: Path) -> None:
    with complete_or_absent(folder) as temporary:
        (temporary / "model.safetensors").write_text("weights")
        (temporary / "config.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """Yields a folder of a user whom modes stop; root is nobody for the length of the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """Yields a mount point: a folder that cannot be removed, on a disk of its own."""
    folder = tmp_path / "volume"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def test_a_folder_that_exists_is_filled_and_stays_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o750)
    before = folder.stat()
    write(folder)
    assert names(folder) == ["config.json", "model.safetensors"]
    assert (folder.stat().st_ino, folder.stat().st_mode) == (before.st_ino, before.st_mode)
    assert names(tmp_path) == ["out"]


def test_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "later").symlink_to(tmp_path / "disk2")  # which is not there yet
    for link, folder in (("link", "disk"), ("later", "disk2")):
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert names(tmp_path / folder) == ["config.json", "model.safetensors"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(NotADirectoryError, match="leads in a circle"):
        check_target(tmp_path / "circle")


@pytest.mark.parametrize("absolute", [False, True])
def test_the_current_folder(absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path if absolute else Path("."))
    assert sorted(os.listdir(".")) == ["config.json", "model.safetensors"]  # of the folder the process is in


def test_a_mount_point_and_what_its_file_system_puts_there(volume: Path) -> None:
    (volume / "lost+found").mkdir()
    write(volume)
    assert names(volume) == ["config.json", "lost+found", "model.safetensors"]


def test_a_folder_in_a_read_only_one(unprivileged: Path) -> None:
    (unprivileged / "mine").mkdir()
    unprivileged.chmod(0o555)
    with pytest.raises(PermissionError, match=r"cannot be written.*choose another output"):
        check_target(unprivileged / "new")
    with pytest.raises(PermissionError, match="cannot be written"):
        check_parent(unprivileged / "new" / "results.json")
    write(unprivileged / "mine")
    assert names(unprivileged / "mine") == ["config.json", "model.safetensors"]


def test_names_that_cannot_be_are_refused_beforehand(tmp_path: Path) -> None:
    for folder in (tmp_path / ("n" * 300), tmp_path / "new" / ("n" * 300)):
        with pytest.raises(OSError, match=r"(?i)name too long"):
            check_target(folder)
    write(tmp_path / ("n" * 250))
    (tmp_path / "pipe").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_target(tmp_path / "pipe")
    with pytest.raises(NotADirectoryError, match="pipe is a file; choose another output"):
        check_target(tmp_path / "pipe" / "below")


def test_the_entry_that_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    with pytest.raises(FileExistsError, match=r"exists and is not empty.*\.hidden"):
        check_target(tmp_path)
    check_target(tmp_path, besides=(".hidden",))


def test_config_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = Path.rename, []
    monkeypatch.setattr(Path, "rename", lambda self, target: moved.append(self.name) or rename(self, target))
    with complete_or_absent(tmp_path) as temporary:
        for name in ("adapter_config.json", "config.json", "a", "tokenizer.json", "model.safetensors"):
            (temporary / name).touch()
    assert moved == ["a", "model.safetensors", "tokenizer.json", "adapter_config.json", "config.json"]


def test_a_move_that_fails_leaves_the_files_where_they_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"cannot be written any more \(Input/output error\).*is in (.*)$") as caught:
        write(tmp_path)
    assert names(Path(str(caught.value).rpartition(" is in ")[2])) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_target_that_was_taken_in_the_meantime(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if exists:
        folder.mkdir()

    def take() -> None:
        with complete_or_absent(folder) as temporary:
            (temporary / "config.json").write_text("ours")
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("theirs")

    with pytest.raises(OSError, match="cannot be written any more") as caught:
        take()
    assert (folder / "config.json").read_text() == "theirs"
    assert (Path(str(caught.value).rpartition(" is in ")[2]) / "config.json").read_text() == "ours"


@pytest.mark.parametrize("exists", [False, True])
def test_a_block_that_fails_leaves_nothing(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    if exists:
        folder.mkdir(parents=True)

    def interrupted() -> None:
        with complete_or_absent(folder) as temporary:
            (temporary / "config.json").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(folder if exists else tmp_path) == []


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_are_those_of_the_umask(mask: int, file: int, folder: int, tmp_path: Path) -> None:
    with umask(mask):
        for target in (tmp_path / "new", tmp_path / "there"):
            if target.name == "there":
                target.mkdir()
            with complete_or_absent(target) as temporary:
                (temporary / "inner").mkdir(mode=0o700)
                for name in ("usual", "inner/for_its_owner", "for_everybody"):
                    (temporary / name).touch()
                (temporary / "inner/for_its_owner").chmod(0o600)
                (temporary / "for_everybody").chmod(0o777)
            assert mode(target) == folder
            assert {mode(path) for path in target.rglob("*") if path.is_file()} == {file}
            assert mode(target / "inner") == folder
        replace_file(tmp_path / "text.json", "{}")
        with file_complete_or_absent(tmp_path / "states") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
    assert (mode(tmp_path / "text.json"), mode(tmp_path / "states")) == (file, file)


def test_a_file_that_is_replaced_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    file, link = tmp_path / "results.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    replace_file(link, "new")
    assert link.is_symlink()
    assert (file.read_text(), mode(file)) == ("new", 0o640)
    assert names(tmp_path) == ["link.json", "results.json"]


def test_a_device_is_written_in_place() -> None:
    check_parent(Path("/dev/null"))
    replace_file(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


def test_a_file_in_a_read_only_folder_is_written_in_place(unprivileged: Path) -> None:
    file = unprivileged / "results.json"
    file.write_text("old")
    unprivileged.chmod(0o555)
    check_parent(file)
    replace_file(file, "new")
    assert file.read_text() == "new"


def test_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/out") == tmp_path / "out"
    assert user_path("a/~/b[1]") == Path("a/~/b[1]")
    assert user_path("~no-such-user-here/out") == Path("~no-such-user-here/out")


def _raise(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


def test_an_unknown_free_space_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for unknown in (lambda _: usage(0, 0, 0), _raise(OSError(38, "Function not implemented"))):
        monkeypatch.setattr(shutil, "disk_usage", unknown)
        check_space(tmp_path / "new" / "out", 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 0))
    with pytest.raises(OSError, match=r"0\.00 GB free"):
        check_space(tmp_path, 10**9)
