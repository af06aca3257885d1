"""One pass over the decoder that gives linears a low-rank branch, block by block, by the inputs of each."""

from collections.abc import Callable, Iterator

import torch
from quad_kernels import split_input

from quad_modifiers.journal import digest_of
from quad_modifiers.linalg import StreamingGram
from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.on_disk import on_disk, rest
from quad_modifiers.passes.calibration_stream import CalibrationBatch, first_block_inputs, in_float32, in_parts
from quad_modifiers.passes.kept_blocks import KeptBlocks
from quad_modifiers.passes.runners import runner_of
from quad_modifiers.quantization.flat_residual import FlatResidual
from quad_modifiers.ranks import OrderedSum, ranks

Find = Callable[[torch.Tensor, torch.Tensor], FlatResidual]
"""From a residual weight, `[out, n]`, float32, and the second moment of its inputs, `[n, n]`, float64."""


@torch.no_grad()
def add_branches(
    decoder: Decoder, batches: list[dict[str, torch.Tensor]], find: Find, skipped: Callable[[str], bool]
) -> Iterator[list[list[float]]]:
    """Gives every chosen linear a branch, in order; yields the losses of each in a block when that is done.

    Each block is a layer in the journal of the run.

    Args:
        decoder: with `QuadLinear` linears that are not quantized.
        batches: `input_ids` and optional `attention_mask`.
        find: what the branch is to be.
        skipped: predicate on full module names: linears that get none.
    """
    stream = first_block_inputs(decoder, batches, shared=True)
    log = KeptBlocks("branches", stream, start=lambda: digest_of(decoder.model.named_parameters()))
    for block in decoder.blocks:
        dtype = next(block.linears()).module.qweight.dtype
        chosen = [linear for linear in block.linears() if not skipped(linear.name)]
        kept = log.result(block)
        if kept is not None:
            parts, losses = kept
            _install(chosen, parts)
            rest(block.module)
            yield losses
            continue
        with in_float32(block.module):
            moments = _moments(decoder, block, stream)

            def branch(linear: PlacedLinear, moments: dict[str, torch.Tensor] = moments) -> FlatResidual:
                try:
                    return find(linear.module.residual.weight, moments[linear.name])
                except ValueError as error:
                    raise ValueError(f"{linear.name}: {error}") from error

            found = ranks().each(chosen, branch)
        parts = {}
        for linear, part in zip(chosen, found, strict=True):
            parts |= _stored(linear, part, dtype)
        _install(chosen, parts)
        rest(block.module)
        losses = [part.losses for part in found]
        log.finish(parts, losses)
        yield losses


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


def _stored(linear: PlacedLinear, part: FlatResidual, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a branch as the model holds them, by names that begin with the linear's."""
    down = unsplit_residual(part.down.double(), linear.module.split)
    return {f"{linear.name}.down": down.to(dtype), f"{linear.name}.up": part.up.to(dtype)}


def _install(linears: list[PlacedLinear], parts: dict[str, torch.Tensor]) -> None:
    """Puts branches beside linears and takes what they compute out of the residual weights."""
    for linear in linears:
        module, weight = linear.module, linear.module.residual.weight
        down, up = (parts[f"{linear.name}.{name}"].to(weight.device) for name in ("down", "up"))
        inside = up.double() @ split_input(down.double(), module.split)[1]
        module.set_weights(module.split, weight.double() - inside, module.outlier_weight, module.bias)
        module.add_term(BranchTerm(down, up))
