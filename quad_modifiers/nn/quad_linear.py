"""A linear layer split into a full-precision outlier part and a residual part to quantize."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from quad_kernels import InputQuantization, InputSplit, IntegerGrid, LowRank, QuantizedWeight
from torch import nn

from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.nn.forward import LinearParts, linear_forward
from quad_modifiers.nn.from_compressed_tensors import is_frozen, stock_quantized_weight
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.term import RESERVED_KINDS, LinearTerm

OUTLIER_GRID = IntegerGrid(8)
"""Grid of outlier weights that are quantized."""


class OutlierLinear(nn.Linear):
    """The full-precision part of a `QuadLinear`, which reads its weight without calling it."""


class QuadLinear(nn.Module):
    """y = outlier(x_outlier) + residual(x_residual) + terms(x) + bias.

    `residual` is a plain `nn.Linear` until it is quantized, so any llm-compressor modifier can quantize it; then, or in
    a loaded checkpoint, it is a `PackedLinear`. So is `outlier`, where it has 8 bits. The container starts as a
    pass-through around the linear it replaces (which becomes `residual`, the very same object): modifiers that hold a
    reference to that linear, such as SmoothQuant, keep working until the projection rewrites the weights.

    Args:
        residual: the layer to wrap, or the residual of a loaded checkpoint.
        role: place in the block, such as "q_proj" or "down_proj".
        split: division of the input; none by default.
    """

    def __init__(self, residual: nn.Module, role: str, split: InputSplit | None = None) -> None:
        super().__init__()
        self.role = role
        self.split = InputSplit(int(residual.in_features)) if split is None else split
        self.input_quantization: InputQuantization | None = None
        self.quantize_input = False  # off until every earlier modifier has seen the unquantized activations
        self.outlier_quantization: InputQuantization | None = None  # of the outlier input, if there are outliers
        self.outlier: OutlierLinear | PackedLinear | None = None
        self.residual = residual
        self._has_terms = False  # looked up at every call
        self.register_parameter("bias", None)  # stays with the linear until `take_bias`

    def allocate(self, bias: bool, dtype: torch.dtype, packed_outlier: bool = False) -> None:
        """Allocates an unset outlier weight, packed or not, and bias, to be filled from a checkpoint."""
        if self.split.rank and packed_outlier:
            self.outlier = PackedLinear(
                self.split.rank, self.out_features, OUTLIER_GRID, dtype, self.outlier_quantization
            )
        elif self.split.rank:
            self.outlier = OutlierLinear(self.split.rank, self.out_features, bias=False, dtype=dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype), requires_grad=False)

    def add_term(self, term: LinearTerm) -> None:
        """Adds a term, whose output is added to the layer's; another of its kind is replaced.

        Raises:
            ValueError: if the kind has the name of a part that every linear may have.
        """
        if term.kind in RESERVED_KINDS:
            raise ValueError(f"a term cannot be of the kind {term.kind!r}, which is a part of every linear; rename it")
        for tensor in chain(term.parameters(), term.buffers()):
            tensor.data = tensor.data.contiguous()  # as a checkpoint holds it: the order in memory may change sums
        self.add_module(term.kind, term)
        self._has_terms = True

    def terms(self) -> list[LinearTerm]:
        """Returns the terms by the name of their kind, which is the order in which they are summed."""
        return sorted((child for child in self.children() if isinstance(child, LinearTerm)), key=lambda term: term.kind)

    def take_bias(self) -> None:
        """Moves the bias from the wrapped linear to the container.

        Not before the modifiers that come earlier in a recipe are done: SmoothQuant scales a linear with its bias.
        """
        if isinstance(self.residual, nn.Linear) and self.residual.bias is not None:
            bias = self.residual.bias.detach()
            del self.residual.bias  # llm-compressor's offloading cannot overwrite a tensor with None
            self.residual.register_parameter("bias", None)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def outlier_weight(self) -> torch.Tensor | None:
        """Full-precision weight of the outlier coordinates, `[out, rank]`, None for rank 0 or if it is quantized."""
        outlier = self._modules.get("outlier")
        return None if outlier is None or isinstance(outlier, PackedLinear) else outlier.weight

    @property
    def packed_outlier(self) -> PackedLinear | None:
        """The quantized weight of the outlier coordinates, None for rank 0 or in full precision."""
        outlier = self._modules.get("outlier")
        return outlier if isinstance(outlier, PackedLinear) else None

    def dense_outlier(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the weight of the outlier coordinates in floating point, `[out, rank]`, None for rank 0."""
        packed, weight = self.packed_outlier, self.outlier_weight
        if packed is not None:
            return packed.dequantized(dtype)
        return None if weight is None else weight.to(dtype)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.split.width

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.residual.out_features)

    def set_weights(
        self, split: InputSplit, residual: torch.Tensor, outlier: torch.Tensor | None, bias: torch.Tensor | None
    ) -> None:
        """Replaces the weights; `residual` `[out, split.residual_width]`, `outlier` `[out, split.rank]` or None."""
        reference = self.residual.weight
        self.split = split
        self.residual.weight = nn.Parameter(residual.to(reference), requires_grad=False)
        self.residual.out_features, self.residual.in_features = residual.shape
        self.outlier = None if outlier is None else _outlier_linear(outlier.to(reference))
        self.bias = None if bias is None else nn.Parameter(bias.to(reference), requires_grad=False)

    def quantized_weight(self) -> QuantizedWeight | None:
        """Returns the residual's quantized weight as the kernels read it best, None while it is not quantized."""
        if isinstance(self.residual, PackedLinear):
            return self.residual.prepared_weight()
        return stock_quantized_weight(self.residual)

    def packed(self) -> PackedLinear | None:
        """Returns the residual as a checkpoint holds it, None while it is not quantized.

        A linear that a stock modifier of llm-compressor has quantized is converted; it stays in its place.
        """
        if isinstance(self.residual, PackedLinear):
            return self.residual
        weight = stock_quantized_weight(self.residual)
        return None if weight is None else PackedLinear.of(weight, weight.scale.dtype, self.input_quantization)

    @property
    def is_quantized(self) -> bool:
        """True once the residual's weight is quantized."""
        return isinstance(self.residual, PackedLinear) or is_frozen(self.residual)

    @property
    def weight_scale(self) -> torch.Tensor | None:
        """The scales of the residual's quantized weight, `[out, groups]`, None while it is not packed."""
        return self.residual.weight_scale if isinstance(self.residual, PackedLinear) else None

    @property
    def qweight(self) -> torch.Tensor:
        """A tensor of the residual with the device and dtype of the layer; PEFT looks for it under this name."""
        return self.residual.like if isinstance(self.residual, PackedLinear) else self.residual.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer to `[..., in]`; the outlier coordinates bypass the quantization of the input."""
        modules = self._modules  # looked up hundreds of times for a token: without nn.Module's detour
        if not (
            _is_offloaded(modules["residual"])
            or _is_offloaded(modules.get("outlier"))
            or (self._has_terms and _is_offloaded(modules.get(BranchTerm.kind)))
        ):
            return linear_forward(x, self.parts())
        with self.present() as parts:
            return linear_forward(x, parts)

    @contextmanager
    def present(self) -> Iterator[LinearParts]:
        """Yields the parts, with their tensors on the device that computes where accelerate offloads them."""
        with _present(self.residual), _present(self.outlier), _present(self._modules.get(BranchTerm.kind)):
            yield self.parts()

    def parts(self) -> LinearParts:
        """Returns what the layer is made of now."""
        quantization = self.input_quantization if self.quantize_input else None
        residual = self._modules["residual"]
        weight = None
        if isinstance(residual, PackedLinear):
            weight = residual.prepared_weight()
        elif quantization is not None:
            weight = stock_quantized_weight(residual)
        outlier = self._modules.get("outlier")
        outlier_weight: torch.Tensor | QuantizedWeight | None = None
        if outlier is not None:
            outlier_weight = outlier.prepared_weight() if isinstance(outlier, PackedLinear) else outlier.weight
        terms, branch = self._split_terms() if self._has_terms else ((), None)
        return LinearParts(
            self.split,
            residual if weight is None else weight,
            quantization,
            outlier_weight,
            self._parameters["bias"],
            terms,
            None if outlier is None or not self.quantize_input else self.outlier_quantization,
            branch=branch,
        )

    def _split_terms(self) -> tuple[list[LinearTerm], LowRank | None]:
        """Returns the terms to call, and the branch for the kernels: not one that somebody listens to."""
        term = self._modules.get(BranchTerm.kind)
        if not isinstance(term, BranchTerm) or term._forward_hooks or term._forward_pre_hooks:
            return self.terms(), None
        return [each for each in self.terms() if each is not term], term.low_rank()

    def extra_repr(self) -> str:
        """The split and the input quantization."""
        return f"role={self.role}, split={self.split}, input_quantization={self.input_quantization}"


def _is_offloaded(module: nn.Module | None) -> bool:
    """True if accelerate brings and takes away the tensors of a part."""
    return module is not None and "_hf_hook" in module.__dict__


@contextmanager
def _present(module: nn.Module | None) -> Iterator[None]:
    """Runs accelerate's hook of a part whose tensors the container reads itself: it brings offloaded tensors."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _outlier_linear(weight: torch.Tensor) -> OutlierLinear:
    linear = OutlierLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
