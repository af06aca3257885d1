"""What this package adds to lm-eval, and what it says when a task cannot be had."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import quad_modifiers

pytest.importorskip("lm_eval")
pytest.importorskip("gensim")

from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.registry import get_model

from quad_modifiers.tools.evaluation import __main__ as command_line
from quad_modifiers.tools.evaluation import harness

ROOT = Path(quad_modifiers.__file__).parents[1]
HUB_TASK = "task: a_hub_task\ndataset_path: nobody/nothing\noutput_type: loglikelihood\ntest_split: test\n"


@pytest.fixture
def small_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index without lm-eval's own tasks, which take many seconds, but with one whose data is on the Hub."""
    (tmp_path / "a_hub_task.yaml").write_text(HUB_TASK)
    folders = [str(harness.TASKS_FOLDER), str(tmp_path)]
    manager = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **_: manager(include_path=folders, include_defaults=False))


def test_the_model_type_is_registered_beside_those_of_lm_eval() -> None:
    harness.register()
    harness.register()
    assert get_model("quad").__name__ == "QuadLM"
    assert get_model("hf").__name__ == "HFLM"


def test_registering_imports_no_model_code() -> None:
    code = "import sys; from quad_modifiers.tools.evaluation.harness import register; register(); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "quad_modifiers.tools.evaluation.lm" not in done.stdout.split()


def test_every_task_file_is_listed() -> None:
    files = {file.stem for file in harness.TASKS_FOLDER.glob("*.yaml")}
    assert files == {*harness.OFFLINE_TASKS, harness.OFFLINE_GROUP}
    for file in harness.TASKS_FOLDER.glob("*.yaml"):
        assert re.search(rf"^(task|group): {file.stem}$", file.read_text(), re.M)


def test_offline_tasks_load_without_lm_evals_index(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    manager = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **given: made.append(given) or manager(**given))
    loaded = harness.load_tasks(harness.OFFLINE_TASKS)
    assert [given["include_defaults"] for given in made] == [False]
    assert [list(task.tasks) for task in loaded] == [[name] for name in harness.OFFLINE_TASKS]
    assert [len(task.tasks[task.name].eval_docs) for task in loaded[:3]] == [450, 450, 450]
    first = loaded[0]
    assert first.items_digest(None) == first.items_digest(None) == first.items_digest(450)
    assert len({first.items_digest(None), first.items_digest(2), first.items_digest(3)}) == 3


def test_a_group_without_a_score_stands_for_its_members() -> None:
    loaded = harness.load_tasks([harness.OFFLINE_GROUP])
    assert [task.name for task in loaded] == list(harness.OFFLINE_TASKS)
    with pytest.raises(ValueError, match="quad_code is named more than once"):
        harness.load_tasks([harness.OFFLINE_GROUP, "quad_code"])


@pytest.mark.usefixtures("small_index")
def test_a_group_with_a_score_is_one_task(tmp_path: Path) -> None:
    (tmp_path / "choices.yaml").write_text(
        "group: choices\ntask: [quad_continuation, quad_code]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (group,) = harness.load_tasks(["choices"])
    assert (group.name, list(group.tasks), list(group.groups)) == (
        "choices",
        ["quad_continuation", "quad_code"],
        ["choices"],
    )


@pytest.mark.usefixtures("small_index")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["quad_lastwrd"], r"there is no task 'quad_lastwrd'; did you mean quad_lastword or "),
        (["zzz"], r"there is no task 'zzz'; offline tasks are quad_lastword, .* lists all"),
        (["quad_code", "quad_code"], "quad_code is named more than once"),
        ([], "no task is named"),
    ],
)
def test_unknown_tasks(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.load_tasks(names)


@pytest.mark.usefixtures("small_index")
def test_a_task_whose_data_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = (
        r"^the data of task 'a_hub_task' cannot be loaded: ConnectionError: Couldn't reach 'nobody/nothing' on the "
        r"Hub; tasks that need no network are quad_lastword, [^\n]*$"
    )
    with pytest.raises(RuntimeError, match=message):
        harness.load_tasks(["a_hub_task"])


@pytest.mark.slow
def test_lm_evals_command_line(toy_checkpoint, tmp_path: Path) -> None:
    arguments = ["--model", "quad", "--model_args", f"pretrained={toy_checkpoint('llama')}"]
    arguments += ["--tasks", "quad_continuation", "--limit", "2", "--output_path", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    run = partial(subprocess.run, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    done = run([sys.executable, "-m", "quad_modifiers.tools.evaluation", *arguments])
    assert done.returncode == 0, done.stderr
    assert "|quad_continuation|" in done.stdout
    assert list((tmp_path / "results").rglob("*.json"))
    assert "usage: lm-eval" in run([sys.executable, "-m", "quad_modifiers.tools.evaluation", "--help"]).stdout


def test_the_users_tasks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for argument in (["--include_path=/mine"], ["--include_path", "/mine"], ["--tasks", "a"]):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *argument])
        command_line.main()
    own = str(harness.TASKS_FOLDER)
    assert seen == [["--include_path=/mine"], ["--include_path", "/mine"], ["--tasks", "a", "--include_path", own]]
