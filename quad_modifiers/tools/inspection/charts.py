"""Which charts a report has, and what it says about each."""

from functools import partial

from quad_modifiers.tools.inspection import plots
from quad_modifiers.tools.inspection.figures import Chart
from quad_modifiers.tools.inspection.measure.results import Inspection


def charts(found: Inspection) -> list[Chart]:
    """Returns the charts that there are numbers for, in the order of the page."""
    both = any(row.stage == "before" for row in found.inputs)
    sides = "before (orange) and after (blue) the projection" if both else "in the checkpoint"
    made = [
        Chart(
            f"surface-block-{layer}",
            f"Activations of block {layer}",
            "Magnitude by token and channel. Left: the model's own inputs; a few channels or tokens tower over the "
            "rest and set the grid for all. Right: the same inputs as the quantizer sees them; the towers should have "
            "gone into the outlier coordinates (orange), which stay in full precision, and what is quantized (blue) "
            "should be flat."
            if both
            else "Magnitude by token and channel, as the quantizer sees it: outlier coordinates (orange) stay in full "
            "precision; what is quantized (blue) should be flat.",
            partial(plots.draw_surfaces, found, layer),
        )
        for layer in sorted({surface.layer for surface in found.surfaces})
    ]
    made += [
        Chart(
            "spectrum",
            "Spectrum of the residual stream",
            "Energy of each direction of the normalized stream (left), held by the first directions together (middle), "
            "and the error of 4-bit U-type inputs if that many directions stay in full precision (right). A steep "
            "beginning means that few directions do most of the good; a straight tail, that more rank buys little.",
            partial(plots.draw_spectrum, found),
        ),
        Chart(
            "input-error",
            "Error of quantized inputs, by block",
            f"Squared error of each token's input over its energy, {sides}, at 4 and at 8 bits. Lower is better; a "
            "factor of 256 separates 4 and 8 bits where no outlier stretches the grid. Blocks that stick out are "
            "the ones to look at.",
            partial(plots.draw_input_error, found),
        ),
        Chart(
            "grid-ratio",
            "Step of the 4-bit grid over the standard deviation",
            "How many standard deviations of the quantized coordinates one step of the grid spans. Gaussian data of "
            "this width has about 0.4; above 1, most coordinates round to zero.",
            partial(plots.draw_grid_ratio, found),
        ),
    ]
    if found.weights:
        made.append(
            Chart(
                "weight-error",
                "Error of 4-bit weights, by block and role",
                "Signal over error of each linear's output, in dB, with its residual weight rounded to nearest and its "
                "input unquantized. Higher is better. GPTQ, which the recipes use, does better than this; the pattern "
                "stays.",
                partial(plots.draw_weight_error, found),
            )
        )
    made += _loss_charts(found)
    if found.blocks:
        made.append(
            Chart(
                "block-error",
                "Each block against the original's",
                "Error of the residual stream after each block (accumulated), and of what the block itself adds when "
                "it is given the original's stream, with its inputs quantized and without: the distance between the "
                "last two is due to the inputs, the rest to the weights.",
                partial(plots.draw_block_error, found),
            )
        )
    return made


def _loss_charts(found: Inspection) -> list[Chart]:
    if found.subject.kind == "model":
        loss = (
            "Divergence from full precision (KL, nats per token) with one part quantized to 4 bits and everything else "
            "as it was. Small values are the relative increase of the perplexity: 0.05 is 5 %. Mind the logarithmic "
            "axis. The dotted line is the rounding of the model's own dtype, below which nothing can be told."
        )
        blocks = "The same for runs of blocks: inputs and weights of these blocks at 4 bits, all others unquantized."
    else:
        loss = (
            f"Divergence (KL, nats per token). Weights, and inputs and weights: from {found.reference}. Inputs: from "
            "the checkpoint with unquantized inputs, one part quantized as stored. The axis is logarithmic."
        )
        blocks = "The same for runs of blocks: only the inputs of these blocks are quantized."
    return [
        Chart("loss-parts", "Where the perplexity is lost: parts", loss, partial(plots.draw_loss_parts, found)),
        Chart("loss-blocks", "Where the perplexity is lost: depth", blocks, partial(plots.draw_loss_blocks, found)),
    ]
