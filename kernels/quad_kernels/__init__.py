"""Operations that a QUAD checkpoint needs at run time; imports neither `quad_modifiers` nor `quad_peft`.

`quad_linear` is the complete layer, `functional` holds the operations that it is made of; `rounding` is for
compression. Each operation has a folder with a plain PyTorch `reference.py`, which is the truth, and faster
implementations, among which `quad_kernels.backends` chooses.
"""

from typing import Any

from quad_kernels._renamed import renamed
from quad_kernels.backends import Backend, BackendError, backends, choose_backend, register_backend
from quad_kernels.float4 import NumberFormat
from quad_kernels.formats import (
    FloatGrid,
    InputQuantization,
    InputSplit,
    IntegerGrid,
    KVEntries,
    LowRank,
    QuantizedActivations,
    RMSNorm,
    WeightGrid,
)
from quad_kernels.functional import (
    apply_hadamard,
    dequantize_kv,
    fake_quantize,
    integer_linear,
    prepare_weight,
    quantize_activations,
    quantize_input,
    quantize_kv,
    split_input,
    table_product,
)
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.layouts import WeightLayout
from quad_kernels.quad_linear import quad_linear
from quad_kernels.rounding import descend_columns, round_columns, rounding_errors
from quad_kernels.weight import QuantizedWeight

__all__ = [
    "Backend",
    "BackendError",
    "FloatGrid",
    "InputQuantization",
    "InputSplit",
    "IntegerGrid",
    "KVEntries",
    "LinearOperands",
    "LowRank",
    "NumberFormat",
    "QuantizedActivations",
    "QuantizedWeight",
    "RMSNorm",
    "WeightGrid",
    "WeightLayout",
    "apply_hadamard",
    "backends",
    "choose_backend",
    "dequantize_kv",
    "descend_columns",
    "fake_quantize",
    "integer_linear",
    "prepare_weight",
    "quad_linear",
    "quantize_activations",
    "quantize_input",
    "quantize_kv",
    "register_backend",
    "round_columns",
    "rounding_errors",
    "split_input",
    "table_product",
]


def __getattr__(name: str) -> Any:
    return renamed(name)
