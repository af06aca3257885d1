"""The check of a checkpoint's tensors in vLLM.

vLLM does not report missing tensors of a quantized model, and knows fused parameters only. This check runs on the
stream of tensors under the names of the checkpoint.
"""

from collections.abc import Iterable, Iterator

import torch

from quad_modifiers.checkpoint.tensors import refuse, tensor_problem, value_problem
from quad_modifiers.nn.packed_shapes import TensorSpec


def checked_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], expected: dict[str, TensorSpec], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes on the tensors that fit, floating-point ones cast to `dtype`; those whose value was known are dropped.

    ValueError if the stream cannot be read, or at its end, naming tensors that are missing, surplus or damaged.
    """
    missing, problems = set(expected), []
    for name, tensor in _readable(tensors):
        missing.discard(name)
        spec = expected.get(name)
        problem = tensor_problem(name, tuple(tensor.shape), tensor.dtype, spec)
        if problem is None and spec is not None:
            problem = value_problem(name, tensor, spec)
        if problem is not None:
            problems.append(problem)
        elif expected[name].value is None:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    refuse(problems + [f"{name} is missing" for name in sorted(missing)])


def _readable(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    iterator = iter(tensors)
    last = "none"
    while True:
        try:
            name, tensor = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                f"the checkpoint's files cannot be read as safetensors ({error}; last tensor read: {last}); download "
                "it again"
            ) from error
        last = name
        yield name, tensor
