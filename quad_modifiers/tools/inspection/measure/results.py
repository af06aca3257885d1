"""What an inspection finds, as plain numbers: `inspection.json` is these classes, and the charts draw from them.

A *group* is the linears of a block that share one input. An error is the squared error over the square of what it is
the error of, so 0.01 means 20 dB. "before" and "after" are the sides of the projection.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from quad_modifiers.model.architecture import dense_block

Stage = Literal["before", "after"]
Quantized = Literal["inputs", "weights", "inputs and weights"]


@dataclass(frozen=True)
class Subject:
    """The inspected model or checkpoint."""

    name: str  # folder or Hub id
    # "model" for an unquantized model, which is projected in memory, or "checkpoint"
    kind: Literal["model", "checkpoint"]
    model_type: str  # stock model type
    # layers, hidden: decoder blocks, and width of the original residual stream
    layers: int
    hidden: int
    linear_parameters: int  # weights of the decoder's linears
    end_parameters: int  # weights of embedding and head; of a table that they share once
    # rank, basis: rank and basis of the projection; 0 and None without one
    rank: int
    basis: str | None
    recipe: str | None  # recipe whose projection was applied (model), or that made the checkpoint, if known
    baseline: str | None = None  # the original model of a checkpoint, if it was given
    # bits of the checkpoint's inputs by group, the fewest where blocks differ; None where they are not quantized.
    # Empty for a model.
    input_bits: dict[str, int | None] = field(default_factory=dict)
    # the groups of a block in run order, each with whether its linears write the stream (D-type)
    groups: dict[str, bool] = field(
        default_factory=lambda: {group.name: group.writes_stream for group in dense_block()}
    )


@dataclass(frozen=True)
class Settings:
    """How it was measured; enough to measure it again."""

    text: str  # origin of the text
    calibration_windows: int  # number of windows for the spectrum and the projection
    measured_windows: int  # other windows, for everything else
    window_length: int  # tokens of each
    seed: int  # seed that chose the windows
    versions: dict[str, str]  # versions of the packages that matter
    machine: str  # processor or GPU


@dataclass(frozen=True)
class Spectrum:
    """Second moment of the normalized residual stream."""

    energy: list[float]  # share of each eigen-direction, falling, sums to 1; `[hidden]`
    tokens: int  # number of tokens measured, both norms of a block counted apart
    errors: list[tuple[int, float]]  # U-type input error at 4 bits by outlier rank, on other text than the spectrum

    def held_by(self, rank: int) -> float:
        """Returns the share of the energy in the first `rank` directions."""
        return sum(self.energy[:rank])


@dataclass(frozen=True)
class InputRow:
    """The input of one group of linears in one block."""

    stage: Stage
    layer: int
    group: str
    outlier_energy: float  # share of the energy in the coordinates that stay in full precision, mean over tokens
    # error_4bit, error_8bit: error of the input with its residual rounded, mean over tokens
    error_4bit: float
    error_8bit: float
    step_to_std: float  # GSR: step of the 4-bit grid over the standard deviation of the residual, mean over tokens


@dataclass(frozen=True)
class WeightRow:
    """The weight of one linear, its residual part rounded to nearest on a 4-bit grid with clip search."""

    stage: Stage
    layer: int
    role: str
    weight_error: float  # squared error over the squared weight, outlier columns included
    output_error: float  # expected squared output error over the expected squared output, inputs unquantized
    step_to_std: float  # GSR: step of a row's grid over the standard deviation of its residual part, mean over rows


@dataclass(frozen=True)
class Surface:
    """Magnitudes of one input, token by channel, each cell the maximum of a few tokens and channels."""

    stage: Stage
    layer: int
    group: str
    outliers: int  # the columns that stay in full precision, which are the first ones
    # tokens, channels: numbers of tokens and channels that the rows and columns cover
    tokens: int
    channels: int
    values: list[list[float]]  # `[rows][columns]`


@dataclass(frozen=True)
class LossRow:
    """The model with one part quantized and the rest as it was."""

    stage: Stage
    part: str  # quantized part: a group, a role, "blocks 4-5", "all", or "nothing"
    quantized: Quantized  # inputs, weights (rounded to nearest with clip search), or both
    bits: str  # bits of the part, such as "4" or "U 4, D 8"
    # KL divergence of the next token's distribution from the reference's, mean over tokens, nats. It is what `loss`
    # would come to on text that the reference wrote itself, and needs far less text to settle.
    divergence: float
    loss: float  # mean negative log-likelihood of a token less that of the reference, nats
    stderr: float | None  # standard error of `loss` over windows, which are the same ones; None for a single window
    perplexity: float  # exp of the mean negative log-likelihood


@dataclass(frozen=True)
class BlockRow:
    """One block of a checkpoint against the same block of the original, in the original's basis, mean over tokens."""

    layer: int
    accumulated: float  # error of the residual stream after the block, everything before quantized as well
    alone: float  # error of what the block adds to the stream, given the original's stream as input
    alone_weights: float  # the same with inputs unquantized


@dataclass(frozen=True)
class Rule:
    """One rule of the recommendation and its result."""

    number: str  # number of the rule in docs/guide/inspection.md, such as "R1"
    question: str  # question that the rule decides
    measured: str  # the numbers that it looked at, in words
    rule: str  # the rule itself, its threshold included
    answer: str  # conclusion from the numbers


@dataclass(frozen=True)
class Recommendation:
    """The conclusions from the numbers; a field is None where its rule had nothing to go by."""

    rank: int | None
    u_type_bits: int | None
    d_type_bits: int | None
    recipe: str | None
    rules: list[Rule]


@dataclass(frozen=True)
class Inspection:
    """Everything that was measured; see the classes of the parts."""

    subject: Subject
    settings: Settings
    reference_perplexity: float  # perplexity of the reference
    # model that the losses are against, in words. The single inputs of a checkpoint are against the checkpoint with
    # unquantized inputs.
    reference: str
    spectrum: Spectrum
    inputs: list[InputRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)
    losses: list[LossRow] = field(default_factory=list)
    blocks: list[BlockRow] = field(default_factory=list)
    recommendation: Recommendation | None = None
    format_version: int = 1

    def loss_of(self, part: str, quantized: Quantized, bits: str, stage: Stage = "after") -> LossRow | None:
        """Returns the row of one quantized part, None if it was not measured."""
        wanted = (stage, part, quantized, bits)
        rows = (row for row in self.losses if (row.stage, row.part, row.quantized, row.bits) == wanted)
        return next(rows, None)


def write_json(content: object, file: Path) -> None:
    """Writes one of the dataclasses as JSON; floats keep six significant digits, NaN and infinity become null."""
    text = json.dumps(asdict(content))  # type: ignore[call-overload]
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"), parse_constant=lambda _: None)
    file.write_text(json.dumps(rounded, indent=1, allow_nan=False) + "\n", encoding="utf-8")
