"""The speeds that the demonstration prints; nothing here expects a time."""

import re

import pytest
import torch
from quad_kernels import choose_backend
from quad_kernels.native import library

from quad_modifiers.tools.demo.token_speed import Speed, SpeedTask, kernels_in_use, measure_speed, speed_lines

TASK = SpeedTask(prompt=20, context=6, new=3, runs=2)


@pytest.fixture
def counted(make_toy):
    """Two toys, and what their forward passes were given: the toy's index and the number of tokens."""
    toys, calls = [make_toy(seed=seed) for seed in (0, 1)], []
    for index, toy in enumerate(toys):
        toy.register_forward_pre_hook(
            lambda module, arguments, options, index=index: calls.append(
                (index, (arguments[0] if arguments else options["input_ids"]).shape[1])
            ),
            with_kwargs=True,
        )
    return toys, calls


def test_speeds_are_positive_and_the_models_take_turns(counted):
    toys, calls = counted
    speeds = measure_speed(toys, TASK)
    assert len(speeds) == 2
    assert all(number > 0 for speed in speeds for number in speed)
    one_run = [(index, tokens) for index in (0, 1) for tokens in (20, 6, 1, 1)]
    assert calls == one_run * (TASK.runs + 1)


def test_a_token_that_ends_the_text_does_not_end_the_measurement(counted):
    toys, calls = counted
    for toy in toys:
        toy.generation_config.eos_token_id = list(range(toy.config.vocab_size - 1))
    measure_speed(toys, SpeedTask(prompt=4, context=4, new=5, runs=1))
    assert [tokens for index, tokens in calls if index == 0] == [4, 4, 1, 1, 1, 1] * 2


def test_the_lines_have_both_speeds_their_ratio_and_the_kernels(make_toy):
    toy = make_toy(dtype=torch.bfloat16)
    before, after = Speed(prefill=800.0, decode=20.0), Speed(prefill=1000.0, decode=50.0)
    text = "\n".join(speed_lines(toy, toy, before, after, TASK))
    decode, prefill = (re.search(rf"{name}, .*\n  before +(.*)\n  after +(.*)", text) for name in ("decode", "prefill"))
    assert decode.groups() == ("20.0", "50.0   ratio 2.50")
    assert prefill.groups() == ("800.0", "1000.0   ratio 1.25")
    assert f"kernels     {kernels_in_use(toy.device)} on cpu" in text
    assert text.endswith("before in bfloat16")


def test_measured_ratios_are_those_of_the_printed_speeds(make_toy):
    toys = [make_toy(), make_toy(seed=1)]
    before, after = measure_speed(toys, TASK)
    text = "\n".join(speed_lines(*toys, before, after, TASK))
    ratios = [float(ratio) for ratio in re.findall(r"ratio (.*)", text)]
    assert ratios == pytest.approx([after.decode / before.decode, after.prefill / before.prefill], abs=0.01)


def test_the_instruction_set_is_said_where_the_native_kernels_run(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("QUAD_KERNELS", "onednn")
    assert kernels_in_use(device) == "onednn"
    monkeypatch.setenv("QUAD_KERNELS", "")
    name = choose_backend(device).name
    assert kernels_in_use(device) == (f"native ({library.instruction_set()})" if name == "native" else name)


@pytest.mark.parametrize("task", [SpeedTask(new=1), SpeedTask(runs=0)])
def test_a_task_without_a_time_is_refused(make_toy, task):
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        measure_speed([make_toy()], task)
