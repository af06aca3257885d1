"""What transformers' own methods of a model do not know of packed weights."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quad_modifiers.checkpoint.generation_settings import settle_generation
from quad_modifiers.checkpoint.saving_arguments import check_saving_arguments
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedTable, TiedHead, is_packed
from quad_modifiers.output_folder import give_usual_modes, user_path
from quad_modifiers.quantization.table_rows import quantize_rows


class QuadModel:
    """The first of two base classes of a checkpoint's model; the other is the stock one."""

    def save_pretrained(self, save_directory: str | Path, *positional: Any, **arguments: Any) -> None:
        """Saves as transformers does, with the generation config made fit for it, and in files that others may read.

        Raises:
            TypeError, ValueError: for an argument that would have no effect.
        """
        stock: Any = super()
        taken = set(inspect.signature(PreTrainedModel.save_pretrained).parameters) - {"kwargs", "push_to_hub", "token"}
        check_saving_arguments(arguments, taken)
        folder = user_path(save_directory)
        settle_generation(self)
        stock.save_pretrained(folder, *positional, **{name: arguments[name] for name in arguments if name in taken})
        give_usual_modes(folder, "*.safetensors")

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the memory of all weights in bytes, those included that were repacked for the kernels.

        Args:
            return_buffers: False to count parameters alone, and so no packed weight.
        """
        stock: Any = super()
        held: int = stock.get_memory_footprint(return_buffers=return_buffers)
        return held + sum(linear.hidden_bytes for linear in _packed_linears(self)) if return_buffers else held

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of parameters, each number of a packed weight counted as one; scales are none.

        Args:
            only_trainable: True to leave out what has no gradient, as packed weights have not.
            exclude_embeddings: True to leave out the embedding.
        """
        stock: Any = super()
        count: int = stock.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        return count if only_trainable else count + packed_parameters(self, exclude_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another embedding in place; a head that reads the embedding's table reads the new one.

        Raises:
            ValueError: if the embedding is packed and the new one is not: config.json says what the checkpoint holds.
        """
        model: Any = self
        _refuse_another_kind(model.get_input_embeddings(), value, "embedding")
        stock: Any = super()
        stock.set_input_embeddings(value)
        head = model.get_output_embeddings()
        if isinstance(head, TiedHead) and isinstance(value, PackedEmbedding):
            head.read(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Puts another head in place.

        Raises:
            ValueError: if the head is packed and the new one is not.
        """
        model: Any = self
        _refuse_another_kind(model.get_output_embeddings(), new_embeddings, "head")
        stock: Any = super()
        stock.set_output_embeddings(new_embeddings)

    def _get_resized_embeddings(self, old_embeddings: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        """The embedding with another number of rows, for `resize_token_embeddings`."""
        stock: Any = super()
        if not isinstance(old_embeddings, PackedTable):
            return stock._get_resized_embeddings(old_embeddings, *arguments, **options)
        twin = nn.Embedding.from_pretrained(old_embeddings.weight.clone())
        return _resized(old_embeddings, stock._get_resized_embeddings(twin, *arguments, **options).weight)

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        """The head with another number of rows; one that reads the embedding's table has got them already."""
        stock: Any = super()
        if isinstance(old_lm_head, TiedHead):
            old_lm_head.read(old_lm_head.table)
            return old_lm_head
        if not isinstance(old_lm_head, PackedTable):
            return stock._get_resized_lm_head(old_lm_head, *arguments, **options)
        twin = nn.Linear(old_lm_head.columns, old_lm_head.rows, bias=False, device="meta")
        twin.weight = nn.Parameter(old_lm_head.weight.clone(), requires_grad=False)
        return _resized(old_lm_head, stock._get_resized_lm_head(twin, *arguments, **options).weight)


def packed_parameters(model: Any, exclude_embeddings: bool = False) -> int:
    """Returns how many numbers the packed weights below a module stand for.

    Args:
        model: any module.
        exclude_embeddings: True to leave out a packed embedding.
    """
    count = sum(linear.in_features * linear.out_features for linear in _packed_linears(model))
    for module in model.modules():
        if isinstance(module, PackedTable) and not (exclude_embeddings and isinstance(module, PackedEmbedding)):
            count += module.rows * module.columns
    return count


def _packed_linears(model: Any) -> Iterator[PackedLinear]:
    return (module for module in model.modules() if isinstance(module, PackedLinear))


def _refuse_another_kind(old: nn.Module, new: nn.Module, what: str) -> None:
    if is_packed(old) and not is_packed(new):
        raise ValueError(
            f"the checkpoint has an 8-bit {what}, and a {type(new).__name__} cannot take the place of the "
            f"{type(old).__name__}; load it with QuadQuantizationConfig(dequantize=True) to change its {what}"
        )


@torch.no_grad()
def _resized(table: PackedTable, weight: torch.Tensor) -> PackedTable:
    """Gives a table the rows of `weight`; those that it has already stay bit for bit."""
    kept = min(table.rows, len(weight))
    table.resize(len(weight))
    quantize_rows(table, weight, kept)
    return table
