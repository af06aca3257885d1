import hashlib
import zipfile
from pathlib import Path

import pytest

from quad_modifiers.tools.demo import packaged_models as models
from quad_modifiers.tools.demo.__main__ import main


@pytest.fixture
def packaged(monkeypatch):
    """The two parts of a model in two packages that exist nowhere."""
    parts = [b"GGUF" + bytes(1000), b"second" * 100]
    whole = b"".join(parts)
    model = models.PackagedModel(
        "Toy", ("quad-no-such-part1==1", "quad-no-such-part2==1"), ".bin", len(whole), hashlib.sha256(whole).hexdigest()
    )
    monkeypatch.setitem(models.MODELS, "toy", model)
    return parts


def copy(gguf: Path, folder: Path) -> None:
    """A converter that only copies."""
    folder.mkdir()
    for name in models.COMPLETE_FILES:
        (folder / name).write_bytes(gguf.read_bytes())


def downloader(parts):
    def download(requirement: str, folder: Path) -> Path:
        index = int(requirement.split("==")[0][-1])
        wheel = folder / f"{index}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"package/data/part0{index}.bin", parts[index - 1])
            archive.writestr("package/__init__.py", "")
        return wheel

    return download


def test_parts_are_joined_in_order_and_nothing_else_is_left(tmp_path, packaged):
    folder = models.fetch("toy", tmp_path / "new" / "toy", downloader(packaged), copy)
    assert (folder / "model.safetensors").read_bytes() == b"".join(packaged)
    assert [entry.name for entry in folder.parent.iterdir()] == ["toy"]


def test_a_complete_folder_is_left_alone(tmp_path, packaged):
    folder = models.fetch("toy", tmp_path / "toy", downloader(packaged), copy)
    assert models.fetch("toy", folder, None) == folder


def test_wrong_content_is_refused_and_leaves_nothing(tmp_path, packaged):
    with pytest.raises(ValueError, match=r"Toy came out as .* expected"):
        models.fetch("toy", tmp_path / "toy", downloader([packaged[0], b"other"]), copy)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused(tmp_path, packaged):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        models.fetch("toy", tmp_path, downloader(packaged), copy)


def test_failed_download_says_what_pip_said(tmp_path, packaged, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"could not download quad-no-such-part1==1 .* pip said"):
        models.fetch("toy", tmp_path / "toy")


def test_unknown_model(tmp_path):
    with pytest.raises(ValueError, match="choose from qwen, smollm2"):
        models.fetch("gpt5", tmp_path)


def test_command_line_reports_errors_without_a_traceback(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["fetch", "smollm2", "--to", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
