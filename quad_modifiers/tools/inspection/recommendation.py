"""From numbers to a recommendation, by rules that are stated; docs/guide/inspection.md says why each is as it is.

Losses are divergences from full precision in nats per token; small ones are the relative increase of the perplexity.
Such a loss grows with the square of the perturbation, which is how it is carried over to ranks that were not tried.
"""

from typing import NamedTuple

import torch
from quad_kernels import choose_backend

from quad_modifiers.tools.inspection.measure.results import Inspection, Quantized, Recommendation, Rule, Stage, Subject

USEFUL_PROJECTION = 0.5  # share of the loss of 4-bit inputs that it must remove
RANK_BUDGET = 0.05  # nats that 4-bit U-type inputs may lose before more rank is bought
MOST_RANK = 8  # at most hidden / 8: then outlier weights take half of what the 4-bit ones take
U_BUDGET = 0.10  # nats that 4-bit U-type inputs may lose before they get 8 bits
D_BUDGET = 0.02  # nats; 8 bits for o_proj and down_proj cost speed in two linears of seven, and no memory
INTEGER_BUDGET = 0.05  # nats that 8-bit inputs may lose before inputs stay in full precision
END_SHARE = 1 / 3  # of the checkpoint in embedding and head, above which they get 8 bits


class _Kind(NamedTuple):
    """A kind of input, and the rule about its bits."""

    number: str
    name: str
    writes: bool
    budget: float
    where: str


_U_INPUTS = _Kind("R3", "U-type inputs (q, k, v, gate, up)", False, U_BUDGET, " at the rank of R2")
_D_INPUTS = _Kind("R4", "D-type inputs (o_proj, down_proj)", True, D_BUDGET, "")


class _Losses(NamedTuple):
    """The measured losses that the rules look at; None where there is no such number."""

    before: float | None
    after: float | None
    u_type: float | None
    d_type: float | None
    eight_bits: float | None
    weights: float | None


def _losses(found: Inspection) -> _Losses:
    subject, is_model = found.subject, found.subject.kind == "model"
    measured = "4" if is_model else "as stored"

    def loss(part: str, quantized: Quantized, bits: str, stage: Stage = "after") -> float | None:
        row = found.loss_of(part, quantized, bits, stage)
        return None if row is None else row.divergence

    def of_kind(part: str, writes: bool) -> float | None:
        known = is_model or _stored_bits(subject, writes) == [4]
        return loss(part, "inputs", measured) if known else None

    return _Losses(
        loss("all", "inputs", "4", "before"),
        loss("all", "inputs", "4"),
        of_kind("U-type", False),
        of_kind("D-type", True),
        loss("all", "inputs", "8"),
        loss("all", "weights", measured) if is_model or subject.baseline else None,
    )


def _stored_bits(subject: Subject, writes: bool) -> list[int | None]:
    """Returns the bits of a checkpoint's inputs of one kind, each once, in run order."""
    return list(dict.fromkeys(bits for group, bits in subject.input_bits.items() if subject.groups[group] == writes))


def recommend(found: Inspection, device: torch.device) -> Recommendation:
    """Returns the recommendation that follows from an inspection, for a model that will run on a device."""
    losses = _losses(found)
    rules: list[Rule] = []
    useful = _projection(losses, rules)
    rank, u_loss = _rank(found, losses, rules)
    u_bits = _bits(_U_INPUTS, found, losses, u_loss, rules)
    d_bits = _bits(_D_INPUTS, found, losses, losses.d_type, rules)
    packed_ends = _ends(found, rules)
    _weights(found, losses, rules)
    recipe = _recipe(useful, rank, u_bits, d_bits, packed_ends, rules)
    _speed(losses, 4 in (u_bits, d_bits), device, rules)
    return Recommendation(rank, u_bits, d_bits, recipe, rules)


def _projection(losses: _Losses, rules: list[Rule]) -> bool:
    if losses.before is None or losses.after is None:
        return True
    useful = losses.after <= (1 - USEFUL_PROJECTION) * losses.before
    rules.append(
        Rule(
            "R1",
            "Does the projection pay?",
            f"all inputs at 4 bits lose {_nats(losses.before)} before it and {_nats(losses.after)} after it",
            f"yes if it takes away at least {USEFUL_PROJECTION:.0%} of the loss",
            "yes" if useful else "no: round the original model's inputs as they are",
        )
    )
    return useful


def _rank(found: Inspection, losses: _Losses, rules: list[Rule]) -> tuple[int | None, float | None]:
    """Returns the rank, and the loss of 4-bit U-type inputs that goes with it."""
    errors = dict(found.spectrum.errors)
    chosen, largest = found.subject.rank, found.subject.hidden // MOST_RANK
    if losses.u_type is None or not errors.get(chosen):
        return None, losses.u_type
    predicted = {rank: losses.u_type * error / errors[chosen] for rank, error in errors.items() if rank <= largest}
    within = [rank for rank, loss in predicted.items() if loss <= RANK_BUDGET]
    rank = min(within) if within else max(predicted)
    listed = ", ".join(f"{each}: {predicted[each]:.3f}" for each in sorted(predicted))
    rules.append(
        Rule(
            "R2",
            "Which rank?",
            f"4-bit U-type inputs lose {_nats(losses.u_type)} at rank {chosen}; carried over with the input error, "
            f"by rank: {listed}",
            f"the smallest that loses at most {RANK_BUDGET:.2f} nats; hidden size / {MOST_RANK} = {largest} at most",
            f"rank {rank}" + ("" if within else ", the largest allowed: none is within the budget"),
        )
    )
    return rank, predicted[rank]


def _bits(kind: _Kind, found: Inspection, losses: _Losses, loss: float | None, rules: list[Rule]) -> int | None:
    """Returns the bits for one kind of input, None for unquantized; those of the checkpoint where nothing is known."""
    if loss is None:
        return next(iter(_stored_bits(found.subject, kind.writes)), None)
    bits: int | None = 4 if loss <= kind.budget else 8
    measured = f"4 bits lose {_nats(loss)}{kind.where}"
    if bits == 8 and losses.eight_bits is not None:
        measured += f", 8 bits in all inputs {_nats(losses.eight_bits)}"
        bits = 8 if losses.eight_bits <= INTEGER_BUDGET else None
    rules.append(
        Rule(
            kind.number,
            f"How many bits for {kind.name}?",
            measured,
            f"4 if they lose at most {kind.budget:.2f} nats; 8 if those lose at most {INTEGER_BUDGET:.2f}; else none",
            "unquantized inputs" if bits is None else f"{bits} bits",
        )
    )
    return bits


def _ends(found: Inspection, rules: list[Rule]) -> bool:
    ends, linears = 2 * found.subject.end_parameters, found.subject.linear_parameters / 2  # bytes: 16 bits, 4 bits
    share = ends / (ends + linears)
    rules.append(
        Rule(
            "R5",
            "Should embedding and head be in 8 bits?",
            f"in 16 bits they would be {share:.0%} of the checkpoint",
            f"yes above {END_SHARE:.0%}",
            "yes: add EmbeddingHeadQuant, as quad_w4a4_e8 has it" if share > END_SHARE else "no",
        )
    )
    return share > END_SHARE


def _weights(found: Inspection, losses: _Losses, rules: list[Rule]) -> None:
    roles = [row for row in found.losses if row.quantized == "weights" and row.part != "all" and row.stage == "after"]
    inputs = losses.after
    if inputs is None:
        row = found.loss_of("all", "inputs", "as stored")
        inputs = None if row is None else row.divergence
    if losses.weights is None or inputs is None:
        return
    worst = max(roles, key=lambda row: row.divergence, default=None)
    measured = f"4-bit weights lose {_nats(losses.weights)}, 4-bit inputs {_nats(inputs)}"
    if found.subject.kind == "checkpoint":
        measured = f"the weights lose {_nats(losses.weights)}, the inputs {_nats(inputs)} more"
    if worst is not None:
        measured += f"; of the roles {worst.part} loses most, {_nats(worst.divergence)}"
    rules.append(
        Rule(
            "R6",
            "What to improve first?",
            measured,
            "whichever loses more",
            "the weights: more calibration windows, or group_size 64" if losses.weights > inputs else "the inputs",
        )
    )


def _recipe(
    useful: bool, rank: int | None, u_bits: int | None, d_bits: int | None, packed_ends: bool, rules: list[Rule]
) -> str:
    """Returns the nearest shipped recipe; its rule says what to change in it."""
    changes = ["d_type_bits: 8", "d_type_clip_ratio: 1.0"] if d_bits == 8 else []
    if u_bits is None or d_bits is None:
        recipe, changes = "quad_w4a16", []
    elif u_bits == 8:
        recipe, changes = "quad_w4a8", [] if d_bits == 8 else ["d_type_bits: 4", "d_type_clip_ratio: 0.86"]
    elif not useful:
        recipe = "rtn_w4a4"
    elif rank == 0:
        recipe = "quarot_w4a4"
    elif d_bits == 8:
        recipe, changes = "quad_w4a4a8", []
    else:
        recipe = "quad_w4a4_e8" if packed_ends else "quad_w4a4"
    if recipe.startswith(("quad_w4a4", "quad_w4a8")) and rank is not None:
        changes.insert(0, f"rank: {rank}")
    if packed_ends and recipe != "quad_w4a4_e8":
        changes.append("EmbeddingHeadQuant added")
    widths = (f"{bits or 'no'} bits for {kind}-type inputs" for bits, kind in ((u_bits, "U"), (d_bits, "D")))
    rules.append(
        Rule(
            "R7",
            "Which recipe?",
            f"rank {'unknown' if rank is None else rank}, {', '.join(widths)}",
            "the shipped recipe of these widths, and what to change in it",
            f"{recipe} with {', '.join(changes)}" if changes else recipe,
        )
    )
    return recipe


def _speed(losses: _Losses, some_four: bool, device: torch.device, rules: list[Rule]) -> None:
    """What 4-bit inputs buy where the model runs; docs/guide/formats.md has it for every kind of machine."""
    if not some_four:
        return
    backend = choose_backend(device)
    measured = f"on {device.type}, the kernels of backend {backend.name!r} multiply {backend.product_bits}-bit integers"
    if losses.after is not None and losses.eight_bits is not None:
        measured += f"; all inputs lose {_nats(losses.after)} at 4 bits, {_nats(losses.eight_bits)} at 8"
    rules.append(
        Rule(
            "R8",
            "Do 4-bit inputs save time there?",
            measured,
            "only if something multiplies 4-bit integers",
            "yes"
            if backend.product_bits <= 4
            else "no, they are widened: quad_w4a8 has 8-bit inputs and loses less; quad_w4a4_g32 is between the two",
        )
    )


def _nats(value: float) -> str:
    return f"{value:.3f} nats"
