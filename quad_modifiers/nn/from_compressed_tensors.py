"""What a stock quantizer of llm-compressor leaves on a linear, in our terms.

The only module that knows compressed-tensors' marks on a module: scheme, status, scales.
"""

from typing import Any

from torch import nn


def reallocate_parameters(model: nn.Module) -> None:
    """Allocates scales for the new shapes where a stock quantizer had allocated them for the old ones."""
    from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization

    for module in model.modules():
        if type(module) is nn.Linear and scheme_of(module) is not None:
            initialize_module_for_quantization(module, scheme_of(module))


def scheme_of(module: nn.Module) -> Any:
    """Returns the quantization scheme that a stock modifier attached to a module, None without one."""
    return getattr(module, "quantization_scheme", None)
