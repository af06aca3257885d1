"""Which code runs an operation: a registry of backends, and the choice among them."""

from quad_kernels.backends.base import Backend
from quad_kernels.backends.native_cpu import NativeBackend
from quad_kernels.backends.onednn_cpu import OneDnnBackend
from quad_kernels.backends.registry import (
    BackendError,
    backends,
    choose_backend,
    register_backend,
    register_backend_path,
    temporary_registrations,
)
from quad_kernels.backends.triton import TritonBackend

for _backend in (Backend(), OneDnnBackend(), NativeBackend(), TritonBackend()):
    register_backend(_backend)

__all__ = [
    "Backend",
    "BackendError",
    "backends",
    "choose_backend",
    "register_backend",
    "register_backend_path",
    "temporary_registrations",
]
