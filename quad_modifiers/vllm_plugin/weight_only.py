"""Weight-only layers with packed weights on the CPU: vLLM's own product of 4-bit weights and 16-bit inputs.

Its operator is called directly. vLLM's layer for it (`CPUWNA16LinearKernel`) would round the inputs to 8 bits on
machines with AMX unless VLLM_CPU_INT4_W4A8=0, which a weight-only checkpoint does not ask for.
"""

from functools import cache

import torch
from quad_kernels import QuantizedWeight
from quad_kernels.packing import pack_int32

_WIDTH = 32  # inputs and outputs come in multiples of it
_BLOCK = 16  # output channels that lie together
_PER_WORD = 8


def is_available() -> bool:
    """Returns whether this vLLM has the operator: its build for processors without AVX-512 leaves it out."""
    from vllm import _custom_ops  # noqa: F401  its import loads the operators

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def fits(weight: QuantizedWeight) -> bool:
    """Returns whether the operator is there and computes with a weight; its scales have the dtype of the inputs."""
    group = weight.in_features // weight.scale.shape[1]
    return (
        weight.scale.device.type == "cpu"
        and is_available()
        and weight.bits == 4
        and weight.sub_scale is None
        and weight.scale.dtype in (torch.bfloat16, torch.float16)
        and weight.in_features % _WIDTH == 0
        and weight.out_features % _WIDTH == 0
        and group % 2 == 0
    )


def packed_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """Returns the tensors that the operator reads.

    `weight_packed` `[out / 16, in * 2]`, int32, `weight_scale` `[groups, out]`, and `weight_zero_point`
    `[groups, out / 8]`, int32, if there are zero points.
    """
    words = pack_int32(weight.unpacked().T.contiguous(), weight.bits)
    blocks = words.unflatten(1, (-1, _BLOCK // _PER_WORD)).transpose(0, 1)
    tensors = {
        "weight_packed": blocks.reshape(weight.out_features // _BLOCK, -1),
        "weight_scale": weight.scale.T.contiguous(),
    }
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = pack_int32(weight.zero_point.T.contiguous(), weight.bits)
    return tensors


def product(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    instructions: str,
) -> torch.Tensor:
    """Returns `[..., out]` for `[..., in]`, dtype of `x`.

    The tensors are those of `packed_tensors`, `instructions` what the function of that name returned at load: a
    compiled graph cannot ask.
    """
    from vllm import _custom_ops

    y: torch.Tensor = _custom_ops.cpu_gemm_wna16(
        input=x,
        q_weight=weight_packed,
        scales=weight_scale,
        zeros=weight_zero_point,
        bias=None,
        pack_factor=_PER_WORD,
        isa_hint=instructions,
    )
    return y


def instructions(dtype: torch.dtype) -> str:
    """Returns the operator's name for the instructions that it should use."""
    return "amx" if dtype == torch.bfloat16 and _amx_is_ready() else "vec"


@cache
def _amx_is_ready() -> bool:
    """Whether this process may use AMX; asks the kernel for it, without whose leave its instructions are illegal."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())
