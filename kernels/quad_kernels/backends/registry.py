"""Registration and choice of backends."""

import logging
import os
from functools import lru_cache

import torch

from quad_kernels.backends.base import Backend

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QUAD_KERNELS"

_backends: dict[str, Backend] = {}


class BackendError(RuntimeError):
    """A backend that was asked for cannot run, or does not exist."""


def register_backend(backend: Backend) -> None:
    """Adds a backend; it takes part in the automatic choice from then on.

    Raises:
        ValueError: if another backend has its name.
    """
    known = _backends.get(backend.name)
    if known is not None and type(known) is not type(backend):
        raise ValueError(f"a kernel backend named {backend.name!r} exists already: {type(known).__qualname__}")
    _backends[backend.name] = backend
    _choose.cache_clear()


def backends() -> dict[str, Backend]:
    """All registered backends by name."""
    return dict(_backends)


def choose_backend(device: torch.device | str, name: str | None = None) -> Backend:
    """Returns the backend for tensors on `device`; the first choice for each device is logged.

    Args:
        device: where the data lies.
        name: a backend to force; by default the environment variable QUAD_KERNELS, and without it the backend of
            highest priority that can run.

    Raises:
        BackendError: if the backend asked for is unknown or cannot run there, with the reason.
    """
    device = torch.device(device)
    return _choose(device.type, device.index, name or os.environ.get(ENVIRONMENT_VARIABLE, ""))


@lru_cache(maxsize=64)
def _choose(device_type: str, index: int | None, name: str) -> Backend:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    if name:
        forced = _backends.get(name)
        if forced is None:
            raise BackendError(f"there is no kernel backend {name!r}; there are {', '.join(sorted(_backends))}")
        reason = forced.unavailable(device)
        if reason is not None:
            raise BackendError(f"the kernel backend {name!r} cannot run on {device}: {reason}")
        logger.info("kernels on %s: %s (asked for)", device, name)
        return forced
    passed_over: list[str] = []
    for backend in sorted(_backends.values(), key=lambda b: -b.priority):
        if backend.devices and device.type not in backend.devices:
            continue
        reason = backend.unavailable(device)
        if reason is None:
            detail = f" ({'; '.join(passed_over)})" if passed_over else ""
            logger.info("kernels on %s: %s%s", device, backend.name, detail)
            return backend
        passed_over.append(f"{backend.name} cannot run: {reason}")
    raise BackendError(f"no kernel backend runs on {device}: {'; '.join(passed_over)}")
