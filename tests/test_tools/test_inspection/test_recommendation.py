"""The recommendation follows from the numbers, and changes with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quad_kernels import Backend, register_backend
from quad_kernels.backends import temporary_registrations

from quad_modifiers.recipe import list_recipes
from quad_modifiers.tools.inspection.measure.results import Inspection, LossRow, Settings, Spectrum, Subject
from quad_modifiers.tools.inspection.recommendation import recommend

CPU = torch.device("cpu")
SUBJECT = Subject("toy", "model", "llama", 30, 576, 100_000_000, 1_000_000, 64, "extended", "quad_w4a4")
SETTINGS = Settings("text", 16, 4, 512, 0, {}, "machine")
ERRORS = [(0, 0.01), (8, 0.006), (16, 0.005), (32, 0.004), (64, 0.003), (128, 0.002)]


def loss(part: str, quantized: str, bits: str, divergence: float, stage: str = "after") -> LossRow:
    return LossRow(stage, part, quantized, bits, divergence, divergence, 0.01, 20.0)  # type: ignore[arg-type]


def inspection(
    before: float = 4.0,
    u_type: float = 0.045,
    d_type: float = 0.01,
    eight_bits: float = 0.003,
    weights: float = 0.05,
    **subject: object,
) -> Inspection:
    losses = [
        loss("all", "inputs", "4", before, "before"),
        loss("all", "inputs", "4", u_type + d_type),
        loss("all", "inputs", "8", eight_bits),
        loss("U-type", "inputs", "4", u_type),
        loss("D-type", "inputs", "4", d_type),
        loss("all", "weights", "4", weights),
        loss("up_proj", "weights", "4", 0.02),
        loss("q_proj", "weights", "4", 0.01),
    ]
    spectrum = Spectrum([0.5, 0.3, 0.2], 100, ERRORS)
    return Inspection(replace(SUBJECT, **subject), SETTINGS, 20.0, "the model", spectrum, [], [], [], losses, [])


def test_small_losses_get_four_bits() -> None:
    found = recommend(inspection(), CPU)
    assert (found.u_type_bits, found.d_type_bits, found.recipe) == (4, 4, "quad_w4a4")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"d_type": 0.021}, (64, 4, 8, "quad_w4a4a8")),
        ({"u_type": 0.2}, (64, 8, 4, "quad_w4a8")),
        ({"u_type": 0.2, "d_type": 0.03}, (64, 8, 8, "quad_w4a8")),
        ({"u_type": 0.2, "eight_bits": 0.06}, (64, None, 4, "quad_w4a16")),
        ({"before": 0.06}, (64, 4, 4, "rtn_w4a4")),
        ({"u_type": 0.01, "before": 0.1}, (0, 4, 4, "quarot_w4a4")),
        ({"end_parameters": 60_000_000}, (64, 4, 4, "quad_w4a4_e8")),
        ({"end_parameters": 60_000_000, "d_type": 0.05}, (64, 4, 8, "quad_w4a4a8")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_it_follows_the_numbers(change: dict[str, float], expected: tuple[object, ...]) -> None:
    found = recommend(inspection(**change), CPU)
    assert (found.rank, found.u_type_bits, found.d_type_bits, found.recipe) == expected
    assert found.recipe in list_recipes()
    (seventh,) = (rule for rule in found.rules if rule.number == "R7")
    assert seventh.answer.startswith(found.recipe)


@pytest.mark.parametrize(
    ("u_type", "rank"),
    [(0.014, 0), (0.024, 8), (0.029, 16), (0.037, 32), (0.05, 64), (0.2, 64)],
)
def test_rank_is_the_smallest_within_the_budget(u_type: float, rank: int) -> None:
    """The budget is 0.05 nats, the loss goes with the error, and hidden size / 8 = 72 is the limit."""
    found = recommend(inspection(u_type=u_type), CPU)
    assert found.rank == rank
    assert dict(ERRORS)[rank] / dict(ERRORS)[64] * u_type <= 0.05 or rank == 64


def test_rules_state_their_numbers() -> None:
    found = recommend(inspection(d_type=0.033), CPU)
    assert [rule.number for rule in found.rules] == ["R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8"]
    fourth = found.rules[3]
    assert "0.033" in fourth.measured
    assert "0.02" in fourth.rule
    assert fourth.answer == "8 bits"
    assert "up_proj loses most" in found.rules[5].measured


def test_four_bits_are_no_faster_where_kernels_multiply_bytes() -> None:
    found = recommend(inspection(), CPU).rules[-1]
    assert "on cpu, the kernels of backend" in found.measured
    assert "multiply 8-bit integers" in found.measured
    assert "0.055 nats at 4 bits, 0.003 nats at 8" in found.measured
    assert "quad_w4a8" in found.answer
    assert all(rule.number != "R8" for rule in recommend(inspection(u_type=0.2, d_type=0.03), CPU).rules)


def test_a_backend_of_four_bits_makes_them_faster() -> None:
    class Narrow(Backend):
        name, priority, product_bits = "narrow", 99, 4

    with temporary_registrations():
        register_backend(Narrow())
        found = recommend(inspection(), CPU).rules[-1]
    assert "backend 'narrow' multiply 4-bit integers" in found.measured
    assert found.answer == "yes"


def test_improve_what_loses_more() -> None:
    assert "the inputs" in recommend(inspection(u_type=0.3), CPU).rules[5].answer
    assert "the weights" in recommend(inspection(weights=0.3), CPU).rules[5].answer


@pytest.mark.parametrize(("stored", "d_type", "expected"), [(4, 0.03, 8), (4, 0.01, 4), (8, 0.0001, 8)])
def test_of_a_checkpoint(stored: int, d_type: float, expected: int) -> None:
    bits = {"qkv": 4, "gate_up": 4, "o": stored, "down": stored}
    found = inspection(kind="checkpoint", input_bits=bits)
    losses = [
        loss("all", "weights", "as stored", 0.05),
        loss("all", "inputs", "as stored", 0.08),
        loss("U-type", "inputs", "as stored", 0.07),
        loss("D-type", "inputs", "as stored", d_type),
    ]
    recommended = recommend(replace(found, losses=losses), CPU)
    assert recommended.d_type_bits == expected
    assert recommended.rank == 64
