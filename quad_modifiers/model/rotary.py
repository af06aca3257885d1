"""The frequencies of rotary embeddings, which no checkpoint holds: a loaded model computes them from its config."""

import inspect
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_FREQUENCIES = "inv_freq"


def restore_frequencies(model: nn.Module, warn: bool = True) -> None:
    """Gives rotary embeddings the frequencies that their config says; `warn` of those that had others.

    They are a buffer that is not saved. Casting a model rounds it (`model.to(torch.bfloat16)`), and a text that is
    longer than the trained context rescales it for all that come after, under "dynamic" and "longrope". A module whose
    class takes more than a config is left as it is.
    """
    for name, module in model.named_modules():
        if _is_rotary(module):
            fresh = type(module)(module.config)
            if warn and not _agree(module, fresh):
                logger.warning(
                    "%s had other rotary frequencies than its config says, rounded by a cast or rescaled by a long "
                    "text; they are computed anew, as they are when a checkpoint is loaded",
                    name,
                )
            _become(module, fresh)


def _is_rotary(module: Any) -> bool:
    own = dict(module.named_buffers(recurse=False))
    if not any(name.endswith(_FREQUENCIES) for name in own) or not hasattr(module, "config"):
        return False
    needed = [each.name for each in inspect.signature(type(module)).parameters.values() if each.default is each.empty]
    return needed == ["config"] and not any(buffer.is_meta for buffer in own.values())


def _agree(module: nn.Module, fresh: nn.Module) -> bool:
    wanted = dict(fresh.named_buffers(recurse=False))
    found = {name: buffer.cpu() for name, buffer in module.named_buffers(recurse=False) if name in wanted}
    return found.keys() == wanted.keys() and all(
        found[name].dtype == buffer.dtype and torch.equal(found[name], buffer.cpu()) for name, buffer in wanted.items()
    )


def _become(module: nn.Module, fresh: nn.Module) -> None:
    """Takes over buffers and plain attributes, such as the length that the frequencies were rescaled for."""
    device = next(module.buffers(recurse=False)).device
    for name in list(dict(module.named_buffers(recurse=False))):
        delattr(module, name)
    for name, buffer in fresh.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device), persistent=False)
    own, new = vars(module), vars(fresh)
    for name in [name for name in own if name.endswith(_FREQUENCIES) and name not in new]:
        del own[name]  # kept by a long text
    own.update({name: value for name, value in new.items() if isinstance(value, (int, float)) and name != "training"})
