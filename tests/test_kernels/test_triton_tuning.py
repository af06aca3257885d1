"""How the Triton kernel of the integer linear layer is configured: the model, the tuner and its cache on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quad_kernels.integer_linear import config as config_module
from quad_kernels.integer_linear.config import Config, Device, Problem

pytest.importorskip("triton")

from quad_kernels.integer_linear import autotune  # imports triton
from quad_kernels.integer_linear.tune import tune

pytestmark = pytest.mark.usefixtures("own_cache")

SWEEP = Path(__file__).parents[2] / "docs" / "benchmarks" / "tiles-h200.jsonl"
H100 = Device(processors=132, shared_memory=232448, hopper=True)
A100 = Device(processors=108, shared_memory=166912, hopper=False)


def problem(tokens: int = 16, outputs: int = 4096, inputs: int = 4096, **changes: Any) -> Problem:
    plain = Problem(tokens, outputs, inputs, inputs, 64, True, False, False, False)
    return plain._replace(**changes)


@pytest.mark.parametrize("device", [H100, A100, Device(20, 101376, False)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": 128},
        {"group": 48},
        {"group": 128, "zero_point": True},
        {"wide": True},
        {"nibbles": False},
        {"x_packed": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [16, 64, 512, 8192])
def test_every_problem_has_a_configuration(tokens: int, changes: dict[str, Any], device: Device) -> None:
    for outputs, inputs in ((1, 1), (4096, 4096), (28672, 4096), (896, 4864)):
        changed = problem(tokens, outputs, inputs, **changes)
        configs = config_module.candidates(changed._replace(group=min(changed.group, inputs)), device)
        assert configs
        assert len(set(configs)) == len(configs)
        assert all(config_module.shared_memory(config, changed) <= device.shared_memory for config in configs)


def test_few_tokens_use_the_whole_gpu() -> None:
    for outputs in (1024, 4096, 6144):
        config = config_module.default_config(problem(16, outputs), H100)
        assert -(-outputs // config.block_n) * config.split_k >= H100.processors // 2
        assert config.block_m == 16


def test_many_tokens_use_large_tiles_and_no_split() -> None:
    config = config_module.default_config(problem(8192, 14336), H100)
    assert config.split_k == 1
    assert (config.block_m, config.block_n, config.warps) == (128, 128, 4)  # the fastest on an H200, of 20


def test_the_choice_is_close_to_the_fastest_that_was_measured() -> None:
    measured: dict[tuple[Any, ...], dict[Config, float]] = {}
    for line in SWEEP.read_text().splitlines():
        row = json.loads(line)
        key = row["tokens"], row["outputs"], row["inputs"], row["rank"], row["layout"]
        measured.setdefault(key, {})[Config(*row["config"])] = row["seconds"]
    assert len(measured) > 4
    for (tokens, outputs, inputs, rank, layout), seconds in measured.items():
        bucket = config_module.token_bucket(tokens)
        wanted = problem(bucket, outputs, inputs, group=inputs, rank=rank, nibbles=layout == "nibbles")
        chosen = next(config for config in config_module.candidates(wanted, H100) if config in seconds)
        assert seconds[chosen] < 1.2 * min(seconds.values()), (wanted, chosen)


def test_groups_that_no_block_divides_use_the_smallest_block() -> None:
    configs = config_module.candidates(problem(group=64), H100)
    assert {config.block_k for config in configs} == {128}


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (1000, 1024), (100000, 8192)])
def test_token_bucket(tokens: int, bucket: int) -> None:
    assert config_module.token_bucket(tokens) == bucket


def test_serving_does_not_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "tune_problem", lambda *_: pytest.fail("tuned"))
    chosen = autotune.choose_config(problem(), torch.device("cpu"), lambda _: torch.empty(0))
    assert chosen == config_module.default_config(problem(), autotune.describe(torch.device("cpu")))


def _time_by_split(launch: Callable[[], Any], *_: Any, **__: Any) -> float:
    return float(launch().item())


def test_the_fastest_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(autotune.triton.testing, "do_bench", _time_by_split)
    tried: list[Config] = []

    def launch(config: Config) -> torch.Tensor:
        tried.append(config)
        if len(tried) == 1:
            raise RuntimeError("out of registers")
        return torch.tensor(float(10 - len(tried)))

    best = autotune.tune_problem(problem(), cpu, launch)
    assert len(tried) == autotune.MOST_CONFIGS
    assert best == tried[-1]
    autotune.forget()
    assert autotune.choose_config(problem(), cpu, lambda _: pytest.fail("measured again")) == best
    assert [path.suffix for path in autotune.cache_file(cpu).parent.iterdir()] == [".json"]


def test_tuning_is_limited_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune.triton.testing, "do_bench", _time_by_split)
    tried: list[Config] = []

    def launch(config: Config) -> torch.Tensor:
        tried.append(config)
        return torch.tensor(1.0)

    autotune.tune_problem(problem(), torch.device("cpu"), launch, seconds=0.0)
    assert len(tried) == 1


def test_measurements_of_another_process_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, config = torch.device("cpu"), Config(16, 64, 128, 2, 4, 4)
    assert autotune.measured(cpu) == {}
    path = autotune.cache_file(cpu)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([[list(problem(64)), list(config)]]))
    autotune.remember(problem(16), config, cpu)
    autotune.forget()
    assert autotune.measured(cpu) == {problem(64): config, problem(16): config}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[[1]]", "[[[1, 2], [3]]]", '[[[16, 1, 1, 1, 0, 1, 0, 0, 0], ["16", 64, 128, 1, 4, 4]]]'],
)
def test_a_damaged_cache_is_ignored(content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = autotune.cache_file(torch.device("cpu"))
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert autotune.measured(torch.device("cpu")) == {}
    assert path.name in caplog.text


def test_a_cache_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    config = Config(16, 64, 128, 2, 4, 4)
    autotune.remember(problem(), config, torch.device("cpu"))
    assert autotune.choose_config(problem(), torch.device("cpu"), lambda _: torch.empty(0)) == config
    assert "cannot be kept" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tune_measures_and_remembers(device: torch.device) -> None:
    (tuned,) = tune([(16, 1024, 2048)]).items()
    autotune.forget()
    index = torch.device("cuda", torch.cuda.current_device())
    assert autotune.choose_config(tuned[0], index, lambda _: pytest.fail("measured again")) == tuned[1]
