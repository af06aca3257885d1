"""`push_to_hub` of a QUAD model in memory: our saver, then `publish`."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from quad_modifiers.checkpoint.opened import find_tokenizer
from quad_modifiers.tools.publishing.publication import Published, publish

_QUAD_TYPE = "quad_"  # how the `model_type` of a loaded QUAD checkpoint begins


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    max_shard_size: int | str = "5GB",
    check: bool = True,
    overwrite: bool = False,
) -> Published:
    """Writes a checkpoint of a model to a temporary folder, with tokenizer and card, and publishes it.

    Stands in for `PreTrainedModel.push_to_hub`, whose arguments keep their meaning.

    Args:
        model: model that `oneshot` returned, or that was loaded from a QUAD checkpoint.
        repo_id: "org/name", or "name" in the user's own namespace.
        tokenizer: its tokenizer; by default that of the folder or repository it was loaded from, if any.
        private: as in `publish`; None is False.
        base_model: Hub id of the original; by default what `oneshot` loaded, if that was one.
        license: as in `publish`.
        token: as in `publish`; True, like None, means the stored one.
        revision: as in `publish`.
        commit_message: first line of the commit message.
        max_shard_size: largest size of one weight file.
        check: as in `publish`.
        overwrite: as in `publish`.

    Raises:
        ValueError, FileNotFoundError, HubError: as `publish`.
    """
    if token is False:
        raise ValueError("publishing needs a token; token=False forbids to use one")
    source = str(getattr(model.config, "_name_or_path", "") or "")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is None and source:
            tokenizer = find_tokenizer(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if str(model.config.model_type).startswith(_QUAD_TYPE):
            recipe = Path(source) / "recipe.yaml"  # a loaded model does not carry it
            if recipe.is_file() and not (folder / recipe.name).exists():
                shutil.copyfile(recipe, folder / recipe.name)
        elif source.count("/") == 1 and not Path(source).is_dir():
            base_model = base_model or source
        return publish(
            folder,
            repo_id,
            private=bool(private),
            base_model=base_model,
            license=license,
            token=token if isinstance(token, str) else None,
            revision=revision,
            message=commit_message,
            check=check,
            overwrite=overwrite,
            needs_tokenizer=False,
        )
