"""One pass over the decoder that gives linears a low-rank branch, block by block, by the inputs of each."""

from collections.abc import Callable, Iterator

import torch
from quad_kernels import split_input

from quad_modifiers.linalg import StreamingGram
from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.on_disk import on_disk, rest
from quad_modifiers.passes.calibration_stream import CalibrationBatch, first_block_inputs, in_float32, in_parts
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.quantization.flat_residual import FlatResidual
from quad_modifiers.ranks import OrderedSum, ranks

Find = Callable[[torch.Tensor, torch.Tensor], FlatResidual]
"""From a residual weight, `[out, n]`, float32, and the second moment of its inputs, `[n, n]`, float64."""


@torch.no_grad()
def add_branches(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], find: Find, skipped: Callable[[str], bool]
) -> Iterator[list[tuple[PlacedLinear, FlatResidual]]]:
    """Gives every chosen linear a branch, in order; yields those of each block when it is done.

    Args:
        decoder: with `QuadLinear` linears that are not quantized.
        batches: `input_ids` and optional `attention_mask`.
        find: what the branch is to be.
        skipped: predicate on full module names: linears that get none.
    """
    stream = first_block_inputs(decoder, batches, shared=True)
    for block in decoder.blocks:
        dtype = next(block.linears()).module.qweight.dtype
        with in_float32(block.module):
            moments = _moments(decoder, block, stream)
            chosen = [linear for linear in block.linears() if not skipped(linear.name)]

            def branch(linear: PlacedLinear, moments: dict[str, torch.Tensor] = moments) -> FlatResidual:
                try:
                    return find(linear.module.residual.weight, moments[linear.name])
                except ValueError as error:
                    raise ValueError(f"{linear.name}: {error}") from error

            found = list(zip(chosen, ranks().each(chosen, branch), strict=True))
        for linear, part in found:
            _install(linear.module, part, dtype)
        rest(block.module)
        yield found


def _moments(decoder: Decoder, block: Block, stream: list[CalibrationBatch]) -> dict[str, torch.Tensor]:
    """Second moment of the residual input of each linear, `[n, n]`; moves the stream past the block."""
    runner, total = runner_of(block, decoder.architecture), OrderedSum()
    for places in in_parts(stream):
        grams = _grams(block)
        for batch in (stream[place] for place in places):

            def see(group: PlacedGroup, x: torch.Tensor, batch: CalibrationBatch = batch, grams: Grams = grams) -> None:
                if group.names in grams:
                    try:
                        grams[group.names].add(split_input(batch.tokens(x), group.linears[0].module.split)[1])
                    except ValueError as error:
                        raise ValueError(f"{group.names}: {error}") from error

            batch.hidden = on_disk(runner.run(batch.hidden, batch.arguments[block.index], see))
        total.add({name: gram.total for name, gram in grams.items()})
        total.add({f"tokens {name}": torch.tensor(gram.tokens) for name, gram in grams.items()})
    sums = total.total()
    moments: dict[str, torch.Tensor] = {}
    for group in block.quantized_groups():
        tokens = int(sums[f"tokens {group.names}"])
        gram = sums[group.names].to(group.linears[0].module.residual.weight.device)
        mean = StreamingGram.of(gram, tokens).mean() if tokens else gram
        moments |= {linear.name: mean for linear in group.linears}
    return moments


Grams = dict[str, StreamingGram]


def _grams(block: Block) -> Grams:
    """An empty sum for each group of linears."""
    grams = {}
    for group in block.quantized_groups():
        module = group.linears[0].module
        grams[group.names] = StreamingGram(module.split.residual_width, module.residual.weight.device)
    return grams


def _install(linear: QuadLinear, part: FlatResidual, dtype: torch.dtype) -> None:
    """Puts a branch beside a linear and takes what it computes out of the residual weight."""
    weight = linear.residual.weight
    up = part.up.to(weight.device, dtype)
    down = unsplit_residual(part.down.double(), linear.split).to(weight.device, dtype)
    inside = up.double() @ split_input(down.double(), linear.split)[1]
    linear.set_weights(linear.split, weight.double() - inside, linear.outlier_weight, linear.bias)
    linear.add_term(BranchTerm(down, up))
