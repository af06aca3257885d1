"""Keeps a run and the process that it runs in apart: settings of torch, random generators, warnings, log levels."""

import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def kept_apart() -> Iterator[None]:
    """Runs a block under torch's own default settings, and leaves the process as it was before.

    What another part of the program has set for itself, such as a default dtype, would get into the numbers of a
    checkpoint; what the libraries beneath set, such as seeds and log levels, would get into the rest of the program.
    Works as a decorator too.
    """
    with ExitStack() as stack:
        stack.enter_context(default_numerics())
        stack.enter_context(warnings.catch_warnings())
        for restore in (_random_generators(), _environment(), _log_levels()):
            stack.callback(restore)
        yield


@contextmanager
def default_numerics() -> Iterator[None]:
    """Runs a block in float32 without autocast, on the CPU where no device is named, with gradients allowed."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


def _random_generators() -> Callable[[], None]:
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy: Any = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if drawn is not None:
            numpy.random.set_state(drawn)

    return restore


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

    return restore


def _log_levels() -> Callable[[], None]:
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    levels = [(logger, logger.level) for logger in loggers]

    def restore() -> None:
        for logger, level in levels:
            if logger.level != level:
                logger.setLevel(level)

    return restore
