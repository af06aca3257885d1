"""vLLM's linear method for the split linears of a QUAD checkpoint."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from quad_kernels import FloatGrid, LowRank, QuantizedWeight, WeightGrid
from quad_kernels.packing import unpack_int32
from quad_kernels.weight import SUB_SCALE_BITS, SUB_SCALE_OFFSET
from torch import nn
from torch.nn.functional import linear, pad
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase

from quad_modifiers.checkpoint.format import LinearFormat
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.nn.forward import Apply, LinearParts, linear_forward
from quad_modifiers.nn.packed_shapes import packed_shapes
from quad_modifiers.nn.quad_linear import OUTLIER_GRID
from quad_modifiers.vllm_plugin import weight_only
from quad_modifiers.vllm_plugin.kernels import backend_name, prepare_outlier_rows, prepare_rows
from quad_modifiers.vllm_plugin.layout import (
    Rows,
    ShardId,
    column_parallel_rows,
    member_position,
    row_parallel_rows,
    stacked_rows,
)

logger = init_logger("vllm.quad_modifiers")  # vLLM shows what is logged below its own name


class QuadLinearMethod(LinearMethodBase):
    """Loads and applies one fused or single linear, whose members share the format `linear`.

    `branch_ranks` are those of the members' low-rank branches, 0 without.
    """

    def __init__(
        self, linear: LinearFormat, out_features: tuple[int, ...], prefix: str, branch_ranks: tuple[int, ...] = ()
    ) -> None:
        self.linear = linear
        self.out_features = out_features
        self.prefix = prefix
        self.branch_ranks = branch_ranks
        self.split = linear.split()
        self.input_quantization = None if linear.input is None else linear.input.settings()
        self.outlier_quantization = None if linear.outlier is None else linear.outlier.input_settings()
        self.weight: QuantizedWeight | None = None  # its tensors are parameters of the layer
        self.outlier_weight: QuantizedWeight | None = None  # likewise, where it has 8 bits
        self.instructions: str | None = None  # of vLLM's own product, if the tensors of the layer are for that
        self.rows: list[Rows] = []
        self.is_stacked = False  # the checkpoint has one tensor for all members
        self.gathers_input = False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Creates the rank's rows of the checkpoint's tensors, below `residual` and `outlier` as they are stored."""
        if input_size != self.linear.in_features or layer.has_bias != self.linear.bias:
            raise ValueError(
                f"{self.prefix} has {input_size} inputs and bias={layer.has_bias} by config.json, "
                f"{self.linear.in_features} and bias={self.linear.bias} by its quantization_config; the checkpoint is "
                "damaged"
            )
        self.gathers_input = input_size_per_partition != input_size
        if self.gathers_input:
            self.rows = [row_parallel_rows(self.out_features[0], layer.tp_rank, layer.tp_size)]
        elif len(self.out_features) < len(output_partition_sizes):
            self.is_stacked = True
            self.rows = stacked_rows(
                self.out_features[0],
                layer.output_sizes,
                output_partition_sizes,
                layer.tp_rank,
                layer.tp_size,
                self.prefix,
            )
        else:
            self.rows = column_parallel_rows(
                self.out_features, output_partition_sizes, layer.tp_rank, layer.tp_size, self.prefix
            )
        out, split = sum(rows.count for rows in self.rows), self.split
        layer.residual, layer.outlier = nn.Module(), nn.Module()
        if self.linear.weight is None:
            self._register(layer.residual, "weight", torch.empty(out, split.residual_width, dtype=params_dtype))
        else:
            self._register_packed(layer.residual, self.linear.weight.grid(), split.residual_width, out, params_dtype)
        if self.linear.outlier is not None:
            self._register_packed(layer.outlier, OUTLIER_GRID, split.rank, out, params_dtype)
        elif split.rank:
            self._register(layer.outlier, "weight", torch.empty(out, split.rank, dtype=params_dtype))
        rank = sum(self.branch_ranks)
        if rank:
            branch = nn.Module()
            self._register(branch, "down", torch.empty(rank, split.width, dtype=params_dtype))
            self._register(branch, "up", torch.zeros(out, rank, dtype=params_dtype))
            layer.add_module(BranchTerm.kind, branch)

    def _register_packed(self, part: nn.Module, grid: WeightGrid, width: int, out: int, dtype: torch.dtype) -> None:
        specs = packed_shapes(out, width, grid, dtype)
        words, scale = specs["weight_packed"], specs["weight_scale"]
        self._register(part, "weight_packed", torch.zeros(words.shape, dtype=words.dtype))
        self._register(part, "weight_scale", torch.empty(scale.shape, dtype=scale.dtype))
        if isinstance(grid, FloatGrid):
            if "weight_global_scale" in specs:  # one per row: members of a fused layer have their own
                self._register(part, "weight_global_scale", torch.ones(out, 1))
            return
        # Unpacked while they are loaded: the rank's rows need not fill whole words.
        if not grid.symmetric:
            self._register(part, "weight_zero_point", torch.zeros(scale.shape, dtype=torch.int8))
        if grid.sub_scale_bits is not None:
            groups = grid.groups(width)
            self._register(part, "weight_sub_scale", torch.ones(out, groups, dtype=torch.int8))

    def _register(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        loaders = {
            "weight_zero_point": self._load_zero_point,
            "weight_sub_scale": self._load_sub_scale,
            "weight_global_scale": self._load_global_scale,
            "down": self._load_down,
            "up": self._load_up,
        }
        parameter.weight_loader = loaders.get(name, self._load)
        module.register_parameter(name, parameter)

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copies this rank's rows of one member's tensor, `[out, ...]`, or of the one of all members."""
        for rows in self._member_rows(shard_id):
            parameter.data[rows.offset : rows.offset + rows.count].copy_(loaded[rows.start : rows.start + rows.count])

    def _load_zero_point(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Unpacks first: zero points are packed along the rows, `[ceil(out * bits / 32), groups]`."""
        assert self.linear.weight is not None
        out = self.out_features[member_position(shard_id)]
        self._load(parameter, unpack_int32(loaded.T.contiguous(), self.linear.weight.bits, out).T, shard_id)

    def _load_sub_scale(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Unpacks first, likewise: `[ceil(out / 8), groups]`."""
        out = self.out_features[member_position(shard_id)]
        unpacked = unpack_int32(loaded.T.contiguous(), SUB_SCALE_BITS, out) + SUB_SCALE_OFFSET
        self._load(parameter, unpacked.T, shard_id)

    def _load_global_scale(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Gives the number of a member's tensor, `[1]`, to its rows."""
        out = self.out_features[member_position(shard_id)]
        self._load(parameter, loaded.expand(out, 1), shard_id)

    def _branch_columns(self, shard_id: ShardId) -> slice:
        """Where a member's branch lies in that of the layer."""
        member = member_position(shard_id)
        start = sum(self.branch_ranks[:member])
        return slice(start, start + self.branch_ranks[member])

    def _load_down(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copies a member's `[rank, in]` behind those of the members before it; every rank has all of it."""
        parameter.data[self._branch_columns(shard_id)].copy_(loaded)

    def _load_up(self, parameter: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copies this rank's rows of a member's `[out, rank]`; columns of other members' branches stay 0."""
        columns = self._branch_columns(shard_id)
        for rows in self._member_rows(shard_id):
            target = parameter.data[rows.offset : rows.offset + rows.count, columns]
            target.copy_(loaded[rows.start : rows.start + rows.count])

    def _member_rows(self, shard_id: ShardId) -> list[Rows]:
        return self.rows if self.is_stacked else [self.rows[member_position(shard_id)]]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replaces the checkpoint's tensors by those that the kernel backend reads."""
        stored = {name: parameter.data for name, parameter in layer.residual.named_parameters()}
        weight = stored["weight"] if self.linear.weight is None else prepare_rows(self.linear, stored)
        if isinstance(weight, QuantizedWeight) and self.linear.input is None and weight_only.fits(weight):
            self.instructions = weight_only.instructions(weight.scale.dtype)
            tensors: dict[str, torch.Tensor | None] = {**weight_only.packed_tensors(weight)}
        elif isinstance(weight, QuantizedWeight):
            self.weight = weight
            tensors = {
                "weight_packed": weight.integers,
                "weight_scale": weight.scale,
                "weight_zero_point": weight.zero_point,
                "weight_sub_scale": weight.sub_scale,
            }
        else:
            tensors = {"weight": weight}
        if self.linear.outlier is not None:
            stored = {name: parameter.data for name, parameter in layer.outlier.named_parameters()}
            self.outlier_weight = prepare_outlier_rows(self.linear, stored)
            tensors["outlier_packed"] = self.outlier_weight.integers
            tensors["outlier_scale"] = self.outlier_weight.scale
        elif self.split.rank:
            tensors["outlier_weight"] = layer.outlier.weight.data
        if any(self.branch_ranks):
            branch = layer.get_submodule(BranchTerm.kind)
            tensors["branch_down"], tensors["branch_up"] = branch.down.data, branch.up.data
            delattr(layer, BranchTerm.kind)
        del layer.residual, layer.outlier
        for name, tensor in tensors.items():
            if tensor is not None:
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        device = next(layer.parameters()).device
        logger.info_once("QUAD linears on %s: kernel backend %r", device.type, backend_name(device))

    def _parts(self, layer: nn.Module, bias: torch.Tensor | None) -> LinearParts:
        residual: QuantizedWeight | Apply
        if self.instructions is not None:
            residual = partial(
                weight_only.product,
                weight_packed=layer.weight_packed,
                weight_scale=layer.weight_scale,
                weight_zero_point=getattr(layer, "weight_zero_point", None),
                instructions=self.instructions,
            )
        elif self.weight is None:
            residual = partial(linear, weight=layer.weight)
        else:  # the layer's own tensors: vLLM may have moved them
            residual = replace(
                self.weight,
                integers=layer.weight_packed,
                scale=layer.weight_scale,
                zero_point=getattr(layer, "weight_zero_point", None),
                sub_scale=getattr(layer, "weight_sub_scale", None),
            )
        outlier_weight: torch.Tensor | QuantizedWeight | None = getattr(layer, "outlier_weight", None)
        if self.outlier_weight is not None:
            outlier_weight = replace(self.outlier_weight, integers=layer.outlier_packed, scale=layer.outlier_scale)
        return LinearParts(
            self.split,
            residual,
            self.input_quantization,
            outlier_weight,
            bias,
            outlier_quantization=self.outlier_quantization,
            branch=LowRank(layer.branch_down, layer.branch_up) if any(self.branch_ranks) else None,
        )

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Applies the layer to `[..., in]`, or to this rank's part of it in a row-parallel layer.

        The output of a row-parallel layer is zero outside of the rank's rows; vLLM adds the ranks' outputs.
        """
        if self.gathers_input:
            x = tensor_model_parallel_all_gather(x)
            bias = self._own_bias(layer)
        y = linear_forward(x, self._parts(layer, bias))
        if self.gathers_input:
            rows = self.rows[0]
            y = pad(y, (rows.start, self.out_features[0] - rows.start - rows.count))
        return y

    def _own_bias(self, layer: nn.Module) -> torch.Tensor | None:
        """The bias of the rank's rows; vLLM would give the whole one to the first rank."""
        if layer.bias is None or layer.skip_bias_add:
            return None
        return layer.bias[self.rows[0].start : self.rows[0].start + self.rows[0].count]
