"""Rewrites a model into the outlier basis without changing its function.

All products are computed in float64 and cast back once. With c = sqrt((d + r) / d) (1 in the square basis) the stream
becomes c x Q, so that a stock RMSNorm over d + r coordinates, with the original eps and a weight of ones, returns
c x Q / rms(x): writers are multiplied by c, readers divided by it. docs/concepts/projection.md has the derivation.
"""

import torch
from quad_kernels import split_input
from torch import nn

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.nn.input_split import InputSplit
from quad_modifiers.nn.quad_linear import QuadLinear


def _double(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().double()


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replaces a parameter, keeping its dtype and device."""
    reference = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(reference), requires_grad=False))


def untie_head(model: nn.Module, architecture: Architecture) -> None:
    """Gives the head its own weight if it shares the embedding's; the config says so afterwards."""
    head, embedding = (model.get_submodule(p) for p in (architecture.head, architecture.embedding))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


class ResidualBasis:
    """The change of basis of the residual stream.

    Args:
        basis: Q, `[d, width]`, Q Q^T = I, outlier coordinates first.
        rank: r.
    """

    def __init__(self, basis: torch.Tensor, rank: int) -> None:
        self.basis = basis
        self.rank = rank
        self.width = basis.shape[1]
        self.gain = (basis.shape[1] / basis.shape[0]) ** 0.5

    def read(self, weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Weight of a reader of the normalized stream: W diag(norm) Q / c, `[out, width]`."""
        basis = self.basis.to(weight.device)
        return (_double(weight) * _double(norm)) @ basis / self.gain

    def write(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight of a writer to the stream: c Q^T W, `[width, in]`."""
        return self.gain * (self.basis.to(weight.device).T @ _double(weight))

    def write_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Bias of a writer, `[width]`."""
        return None if bias is None else self.gain * (self.basis.to(bias.device).T @ _double(bias))


def project_ends(model: nn.Module, architecture: Architecture, basis: ResidualBasis) -> None:
    """Rewrites embedding, final norm and head."""
    embedding = model.get_submodule(architecture.embedding)
    head = model.get_submodule(architecture.head)
    norm = model.get_submodule(architecture.final_norm)
    _set(head, "weight", basis.read(head.weight, norm.weight))
    head.in_features = basis.width
    _set(embedding, "weight", basis.write(embedding.weight.T).T.contiguous())
    embedding.embedding_dim = basis.width
    _set(norm, "weight", torch.ones(basis.width))


def project_layer(
    layer: nn.Module,
    architecture: Architecture,
    basis: ResidualBasis,
    heads: torch.Tensor,
    head_split: InputSplit,
    mlp_order: torch.Tensor,
    mlp_split: InputSplit,
) -> None:
    """Rewrites one decoder block.

    Args:
        layer: the block; its linears are `QuadLinear` pass-throughs.
        architecture: names of its parts.
        basis: change of basis of the residual stream.
        heads: rotation of the values of each key-value head, `[kv_heads, head_dim, head_dim]`, float64.
        head_split: split of the o_proj input.
        mlp_order: permutation of the MLP channels, outlier channels first, `[intermediate]`.
        mlp_split: split of the down_proj input.
    """
    attention, mlp = layer.get_submodule(architecture.attention), layer.get_submodule(architecture.mlp)
    split = InputSplit(basis.width, basis.rank)
    for parent, norm_name, names in (
        (attention, architecture.attention_norm, architecture.attention_inputs),
        (mlp, architecture.mlp_norm, architecture.mlp_inputs),
    ):
        norm = layer.get_submodule(norm_name)
        for name in names:
            linear = parent.get_submodule(name)
            weight, bias = basis.read(linear.residual.weight, norm.weight), linear.bias
            if name == architecture.value:
                weight, bias = _rotate_heads_out(weight, heads), None if bias is None else _rotate_bias(bias, heads)
            if names == architecture.mlp_inputs:
                weight, bias = weight[mlp_order], None if bias is None else bias[mlp_order]
            _install(linear, split, weight, bias)
        _set(norm, "weight", torch.ones(basis.width))
    output = attention.get_submodule(architecture.attention_output)
    _install(
        output, head_split, _rotate_heads_in(basis.write(output.residual.weight), heads), basis.write_bias(output.bias)
    )
    output = mlp.get_submodule(architecture.mlp_output)
    _install(output, mlp_split, basis.write(output.residual.weight)[:, mlp_order], basis.write_bias(output.bias))


def _rotate_heads_out(weight: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Rows of v_proj: each key-value head's values v become v R."""
    return (heads.to(weight.device).transpose(1, 2) @ weight.unflatten(0, (heads.shape[0], -1))).flatten(0, 1)


def _rotate_bias(bias: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return _rotate_heads_out(_double(bias).unsqueeze(1), heads).squeeze(1)


def _rotate_heads_in(weight: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Columns of o_proj: each query head reads v R, so W becomes W R."""
    kv_heads, head_dim, _ = heads.shape
    columns = weight.unflatten(1, (kv_heads, -1, head_dim))
    return torch.einsum("okgd,kde->okge", columns, heads.to(weight.device)).flatten(1)


def _install(linear: QuadLinear, split: InputSplit, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Divides a weight on the unsplit input between the outlier and the residual linear."""
    # split is orthogonal on its range: outlier columns are picked, the residual keeps zeros and is rotated.
    outlier, residual = split_input(weight, split)
    linear.set_weights(split, residual, outlier, bias)
