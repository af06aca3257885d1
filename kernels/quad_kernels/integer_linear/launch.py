"""Launches of the Triton kernels of the integer linear layer."""

import math

import torch
import triton

from quad_kernels.early_launch import starts_early
from quad_kernels.integer_linear.autotune import choose_config
from quad_kernels.integer_linear.config import Config, Problem, token_bucket
from quad_kernels.integer_linear.few_tokens import FewTokensConfig, default_config, few_tokens_linear, qualifies
from quad_kernels.integer_linear.kernel import linear_kernel, row_sum_kernel
from quad_kernels.integer_linear.operands import LinearOperands
from quad_kernels.integer_linear.workspace import arrival_counters
from quad_kernels.packing.nibbles import CHUNK, HALF
from quad_kernels.whole_numbers import next_power_of_2

OUTLIER_BLOCK, WIDE_OUTLIER_BLOCK = 64, 16  # coordinates per step of the outlier product, in 16 and in 32 bits
UNROLLED_SLAB = 64 * 64  # elements of a tile up to which the partial sums are read all at once
TILE_BAND = 8  # tiles along the tokens that run at the same time
LARGEST_GROUP = 2**17 - 1  # of so many products of -128 and -128, which is 16 * -8, the sum still is an int32
COMPILED = isinstance(linear_kernel, triton.JITFunction)  # not so in Triton's interpreter


def integer_linear(operands: LinearOperands, config: Config | FewTokensConfig | None = None) -> torch.Tensor:
    """Returns `[tokens, out]`; see `quad_kernels.integer_linear`.

    Args:
        operands: operands of the layer.
        config: configuration of the launch, by default that for few tokens where they are few, else the choice of
            `autotune.choose_config`.

    Raises:
        ValueError: if sums could leave int32.
    """
    x = operands.x
    if x.shape[0] == 0:
        return torch.empty(0, operands.weight.out_features, dtype=operands.out_dtype, device=x.device)
    launch = Launch(operands)
    if config is None and launch.takes_few_tokens:
        config = default_config(x.shape[0], launch.problem.outputs, launch.problem.inputs)
        config = config._replace(early=launch.weights_are_old and starts_early(x.device))
    return launch(config or choose_config(launch.problem, x.device, launch))


class Launch:
    """The operands of one layer, ready for the kernel; a call runs it in a given configuration.

    Attributes:
        problem: properties that the choice of a configuration depends on.
        takes_few_tokens: whether the kernel for few tokens can run it.
        weights_are_old: nothing was made of the weights just now, so they may be read before the stream comes to it.
    """

    def __init__(self, operands: LinearOperands) -> None:
        x, x_scale, weight = operands.x, operands.x_scale, operands.weight.with_products()
        if weight.layout not in ("int8", "nibbles"):
            weight = weight.to_layout("nibbles")  # int8 where they do not fit
        self._groups = math.lcm(x_scale.shape[1], weight.scale.shape[1])
        self._group = weight.in_features // self._groups
        if self._group * (2 if weight.zero_point is not None and weight.bits > 4 else 1) > LARGEST_GROUP:
            raise ValueError(
                f"sums over {self._group} inputs could leave int32; use groups, or the backend 'reference'"
            )
        self._x, self._integers = _rows(x), weight.integers.contiguous()
        self._x_scale, self._weight_scale = x_scale.contiguous(), weight.scale.contiguous()
        self._zero_point = weight.zero_point
        self._outlier, self._outlier_weight = _outlier_operands(operands.outlier, operands.outlier_weight)
        self._bias, self._out_dtype = operands.bias, operands.out_dtype
        self.problem = Problem(
            tokens=token_bucket(x.shape[0]),
            outputs=weight.out_features,
            inputs=weight.in_features,
            group=self._group,
            rank=0 if self._outlier is None else self._outlier.shape[1],
            nibbles=weight.layout == "nibbles",
            x_packed=x.dtype == torch.uint8,
            zero_point=weight.zero_point is not None,
            wide=self._outlier is not None and self._outlier.dtype == torch.float32,
        )
        self.takes_few_tokens = (
            self.problem.nibbles
            and not self.problem.zero_point
            and self._groups == 1
            and qualifies(self._x, weight.in_features, self.problem.rank)
        )
        old = operands.weight
        self.weights_are_old = (
            self._integers is old.integers
            and self._weight_scale is old.scale
            and (self._outlier_weight is None or self._outlier_weight is operands.outlier_weight)
        )

    def __call__(self, config: Config | FewTokensConfig) -> torch.Tensor:
        """Returns `[tokens, out]`."""
        if isinstance(config, FewTokensConfig):
            return self._few_tokens(config)
        problem, x, outlier = self.problem, self._x, self._outlier
        tokens, x_groups, weight_groups = x.shape[0], self._x_scale.shape[1], self._weight_scale.shape[1]
        group_mask = self._groups > 1 and self._group % config.block_k != 0
        tiles = -(-tokens // config.block_m) * -(-problem.outputs // config.block_n)
        workspace = counters = None
        if config.split_k > 1:
            slabs = tiles * (config.split_k + (outlier is not None))
            workspace = torch.empty(slabs * config.block_m * config.block_n, dtype=torch.int32, device=x.device)
            counters = arrival_counters(tiles, x.device)
        y = torch.empty(tokens, problem.outputs, dtype=self._out_dtype, device=x.device)
        linear_kernel[(tiles, config.split_k)](
            x,
            self._x_scale,
            None if self._zero_point is None else _row_sums(x, problem.inputs, self._groups),
            self._integers,
            self._weight_scale,
            self._zero_point,
            outlier,
            self._outlier_weight,
            self._bias,
            y,
            workspace,
            counters,
            tokens,
            problem.outputs,
            problem.inputs,
            x.stride(0),
            self._integers.shape[1],
            1 if outlier is None else outlier.stride(0),
            max(1, problem.rank),
            x_groups,
            weight_groups,
            self._groups,
            _blocks_per_group(self._group, config.block_k, group_mask),
            NIBBLES=problem.nibbles,
            X_PACKED=problem.x_packed,
            X_GROUPED=x_groups > 1,
            WEIGHT_GROUPED=weight_groups > 1,
            GROUP_MASK=group_mask,
            MASK=problem.inputs % config.block_k != 0 or group_mask,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            SPLIT_K=config.split_k,
            BAND=TILE_BAND,
            BLOCK_R=WIDE_OUTLIER_BLOCK if problem.wide else OUTLIER_BLOCK,
            UNROLLED_SLAB=UNROLLED_SLAB,
            CHUNK=CHUNK,
            HALF=HALF,
            ASM=COMPILED,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        return y

    def _few_tokens(self, config: FewTokensConfig) -> torch.Tensor:
        return few_tokens_linear(
            self._x,
            self._x_scale,
            self._integers,
            self._weight_scale,
            self._outlier,
            self._outlier_weight,
            self._bias,
            self._out_dtype,
            config,
            COMPILED,
        )


def _outlier_operands(
    outlier: torch.Tensor | None, outlier_weight: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Outliers and their weight in one dtype; neither for rank 0."""
    if outlier is None or outlier_weight is None or outlier.shape[1] == 0:
        return None, None
    if outlier.dtype != outlier_weight.dtype:
        common = torch.promote_types(outlier.dtype, outlier_weight.dtype)
        outlier, outlier_weight = outlier.to(common), outlier_weight.to(common)
    return _rows(outlier), outlier_weight.contiguous()


def _blocks_per_group(group: int, block: int, masked: bool) -> int:
    """Steps over the inputs for one group; one that blocks do not divide touches at most this many of them."""
    return (group + block - 2) // block + 1 if masked else -(-group // block)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Returns the same values with neighbouring columns adjacent in memory; rows may have any distance."""
    return x if x.stride(1) == 1 else x.contiguous()


def _row_sums(x: torch.Tensor, inputs: int, groups: int) -> torch.Tensor:
    sums = torch.empty(x.shape[0], groups, dtype=torch.int32, device=x.device)
    block = min(1024, next_power_of_2(inputs // groups))
    row_sum_kernel[(x.shape[0], groups)](
        x, sums, inputs, x.stride(0), groups, X_PACKED=x.dtype == torch.uint8, BLOCK=block, CHUNK=CHUNK, HALF=HALF
    )
    return sums
