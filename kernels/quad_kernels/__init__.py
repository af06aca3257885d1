"""Operations that a QUAD checkpoint needs at run time; imports neither `quad_modifiers` nor `quad_peft`.

Each operation is a sub-package: one public function, a plain PyTorch `reference.py` that is the truth, and faster
implementations behind the same signature, chosen by `quad_kernels.backends`.
"""

from quad_kernels.backends import Backend, BackendError, backends, choose_backend, register_backend
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm
from quad_kernels.hadamard import apply_hadamard
from quad_kernels.int4_kv import KVEntries, dequantize_kv, quantize_kv
from quad_kernels.integer_linear import integer_linear
from quad_kernels.quad_linear import quad_linear
from quad_kernels.quantize_activations import QuantizedActivations, quantize_activations
from quad_kernels.weight import LinearWeight, prepare_weight

__all__ = [
    "Backend",
    "BackendError",
    "InputQuantization",
    "InputSplit",
    "KVEntries",
    "LinearWeight",
    "QuantizedActivations",
    "RMSNorm",
    "apply_hadamard",
    "backends",
    "choose_backend",
    "dequantize_kv",
    "integer_linear",
    "prepare_weight",
    "quad_linear",
    "quantize_activations",
    "quantize_kv",
    "register_backend",
]
