"""`merge`: writes a checkpoint with its adapter merged."""

import logging
import shutil
from pathlib import Path

from quad_modifiers.checkpoint.opened import find_tokenizer, open_checkpoint
from quad_modifiers.checkpoint.rehearsal import rehearse_saving
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.output_folder import check_space, check_target, complete_or_absent, user_path
from quad_modifiers.records.calibration_record import CALIBRATION_NAME
from quad_modifiers.records.checksums import complete_checksums
from quad_modifiers.records.tuning_record import TUNING_NAME, read_tuning

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"


def merge(checkpoint: str | Path, adapter: str | Path, output: str | Path, options: LoadingOptions = DEFAULTS) -> None:
    """Writes a QUAD checkpoint with an adapter merged into its outlier weights; every runtime loads it as any other.

    Tokenizer, recipe and the record of the calibration are those of the checkpoint. The record of the training,
    `tuning.json`, comes from the adapter; `quad publish` reports it in the model card.

    Args:
        checkpoint: folder or Hub id of the QUAD checkpoint that the adapter was trained on.
        adapter: folder of the adapter.
        output: folder that must not exist or be empty.
        options: how the checkpoint is loaded.

    Raises:
        FileExistsError: if `output` is not empty.
        FileNotFoundError: if one of the two is not there.
        ValueError: if the checkpoint is not a QUAD checkpoint, or the adapter belongs to another one.
    """
    from peft import PeftModel
    from transformers.utils import cached_file

    adapter, output = user_path(adapter), user_path(output)
    check_target(output)
    opened = open_checkpoint(checkpoint, options=options)
    opened.need_quad()
    opened.check_weights()
    if not (adapter / _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{adapter} has no {_ADAPTER_CONFIG}; it is no adapter")
    read_tuning(adapter)  # a damaged record is noticed now, not when the result is published
    tokenizer, loaded = find_tokenizer(opened.name, options), opened.load()
    beside_weights = rehearse_saving(loaded, tokenizer, output)
    check_space(output, beside_weights + loaded.get_memory_footprint())
    model = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
    with complete_or_absent(output) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is None:
            logger.warning("%s has no tokenizer, so %s has none", opened.name, output)
        else:
            tokenizer.save_pretrained(temporary)
        where = {"revision": options.revision, "cache_dir": options.cache_dir}
        kept = [
            cached_file(opened.name, name, _raise_exceptions_for_missing_entries=False, **where)
            for name in ("recipe.yaml", CALIBRATION_NAME)
        ]
        for file in (*kept, adapter / TUNING_NAME):
            if file is not None and Path(file).is_file():
                shutil.copyfile(file, temporary / Path(file).name)
        complete_checksums(temporary)
    logger.info("wrote %s", output)
