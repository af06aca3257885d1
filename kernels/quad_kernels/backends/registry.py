"""Registration and choice of backends."""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from quad_kernels.backends.base import Backend
from quad_kernels.layouts import register_layout, temporary_layouts

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QUAD_KERNELS"

_backends: dict[str, Backend] = {}
_pending: dict[str, tuple[str, str]] = {}  # name to import path and origin, of backends not imported yet
_imported: dict[str, tuple[str, str]] = {}  # name to import path and origin, of those that were
_failed: dict[str, str] = {}  # name to reason


class BackendError(RuntimeError):
    """A backend that was asked for cannot run, or does not exist."""


def register_backend(backend: Backend) -> None:
    """Adds a backend and its layouts; it takes part in the automatic choice from then on.

    Raises:
        ValueError: if another backend has its name, or another layout that of one of its layouts.
        TypeError: if it is written for version 0.1.0 of the interface.

    Example:
        >>> class Exact(Backend):
        ...     name = "exact"
        >>> with temporary_registrations():
        ...     register_backend(Exact())
        ...     choose_backend("cpu", "exact").name
        'exact'
    """
    if hasattr(backend, "int4_linear"):
        raise TypeError(
            f"the kernel backend {backend.name!r} has a method int4_linear, which is never called; it is "
            "integer_linear(operands: quad_kernels.LinearOperands) now"
        )
    for name in (backend.name, *backend.aliases):
        known = _named(name)
        if known is not None and type(known) is not type(backend):
            raise ValueError(f"a kernel backend named {name!r} exists already: {type(known).__qualname__}")
    for name, layout in backend.layouts.items():
        register_layout(name, layout)
    _backends[backend.name] = backend
    _choose.cache_clear()


def _named(name: str) -> Backend | None:
    """Returns the backend of a name or alias, None if there is none."""
    found = _backends.get(name)
    return found or next((backend for backend in _backends.values() if name in backend.aliases), None)


def register_backend_path(name: str, path: str, origin: str) -> None:
    """Adds a backend that is imported when the first choice is made; adding it again changes nothing.

    `path` is "module:object", a `Backend` or a subclass; `origin` is the distribution that contributes it, for
    messages.
    """
    known = _imported.get(name) or _pending.get(name)
    if known == (path, origin):
        return
    if known is not None or _named(name) is not None:
        raise ValueError(f"a kernel backend named {name!r} exists already; {origin} cannot add another")
    _pending[name] = (path, origin)
    _choose.cache_clear()


def backends() -> dict[str, Backend]:
    """Returns all registered backends by name.

    Example:
        >>> sorted(backends())
        ['native', 'onednn', 'reference', 'triton']
    """
    _import_pending()
    return dict(_backends)


@contextmanager
def temporary_registrations() -> Iterator[None]:
    """Removes at its end the backends and layouts that were registered inside it; for tests.

    Example:
        >>> class Mine(Backend):
        ...     name = "mine"
        >>> with temporary_registrations():
        ...     register_backend(Mine())
        >>> "mine" in backends()
        False
    """
    _choose.cache_clear()
    before = [(table, dict(table)) for table in (_backends, _pending, _imported, _failed)]
    with temporary_layouts():
        try:
            yield
        finally:
            for table, content in before:
                table.clear()
                table.update(content)  # type: ignore[arg-type]
            _choose.cache_clear()


def _import_pending() -> None:
    """Imports what was registered by path; a backend that fails is left out with a warning."""
    while _pending:
        name, (path, origin) = _pending.popitem()
        _imported[name] = path, origin
        module, _, attribute = path.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
            backend = found() if isinstance(found, type) else found
            if not isinstance(backend, Backend) or backend.name != name:
                raise TypeError(f"{path} is not a quad_kernels.Backend of the name {name!r}")
            register_backend(backend)
        except Exception as error:  # foreign code: whatever it raises must not stop the other backends
            _failed[name] = f"{origin}: {type(error).__name__}: {error}"
            logger.warning("the kernel backend %r cannot be used; %s", name, _failed[name])


def choose_backend(device: torch.device | str, name: str | None = None) -> Backend:
    """Returns the backend for tensors on `device`; the first choice for each device is logged.

    Args:
        device: device of the data.
        name: name or alias of a backend to force; by default the environment variable QUAD_KERNELS, and without it
            the backend of highest priority that can run.

    Raises:
        BackendError: if the backend asked for is unknown or cannot run there, with the reason.

    Example:
        >>> choose_backend("cpu", "reference").name
        'reference'
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    return _choose(device.type, device.index, name or os.environ.get(ENVIRONMENT_VARIABLE, ""))


@lru_cache(maxsize=64)
def _choose(device_type: str, index: int | None, name: str) -> Backend:
    _import_pending()
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    if name:
        forced = _named(name)
        if forced is None and name in _failed:
            raise BackendError(f"the kernel backend {name!r} cannot be used; {_failed[name]}")
        if forced is None:
            raise BackendError(f"there is no kernel backend {name!r}; there are {', '.join(sorted(_backends))}")
        reason = forced.unavailable(device)
        if reason is not None:
            raise BackendError(f"the kernel backend {name!r} cannot run on {device}: {reason}")
        logger.info("kernels on %s: %s (asked for)", device, forced.name)
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
