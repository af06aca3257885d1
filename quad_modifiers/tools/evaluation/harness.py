"""What this package adds to lm-eval: the model type `quad` and the offline tasks.

lm-eval 0.4.13 looks nowhere for model types of other packages: a type exists once something has registered it in the
same process. `register` does that; `python -m quad_modifiers.tools.evaluation` is lm-eval's command line with it done.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from quad_modifiers.reporting import only_errors

MODEL_TYPE = "quad"
TASKS_FOLDER = Path(__file__).parent / "tasks"
OFFLINE_TASKS = ("quad_lastword", "quad_continuation", "quad_code", "quad_wordppl")
OFFLINE_GROUP = "quad_offline"


def register() -> None:
    """Registers the model type `quad` with lm-eval, without importing it; calling it again changes nothing."""
    import lm_eval.models  # noqa: F401  (lm-eval fills its registry with its own types only while that is empty)
    from lm_eval.api.registry import model_registry

    if MODEL_TYPE not in model_registry:
        model_registry.register(MODEL_TYPE, target="quad_modifiers.tools.evaluation.lm:QuadLM")


@dataclass(frozen=True)
class LoadedTask:
    """One task, ready to be run on any number of models."""

    name: str  # name of a task, or of a group for which lm-eval computes a score
    tasks: dict[str, Any]  # lm-eval's task objects by name; one, unless it is a group
    groups: dict[str, Any]  # lm-eval's group objects by name

    def items_digest(self, limit: int | None) -> str:
        """Returns the sha256 of what is asked: settings of the tasks and their first `limit` items."""
        digest = sha256()
        for name, task in self.tasks.items():
            settings = {key: value for key, value in task.dump_config().items() if key != "metadata"}
            for part in ({name: settings}, *islice(task.eval_docs, limit)):
                digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def load_tasks(names: Sequence[str]) -> list[LoadedTask]:
    """Returns lm-eval's tasks by name, with their data.

    A group for which lm-eval computes a score is one task; other groups, and tags, mean their members.

    Raises:
        ValueError: if no task is named, one is named twice, or lm-eval does not know it (close names follow).
        RuntimeError: if the data of a task cannot be loaded, for example without a network.
    """
    if not names:
        raise ValueError(f"no task is named; there are {', '.join(OFFLINE_TASKS)}, and those of lm-eval")
    _check_repeated(names)
    from lm_eval.tasks import TaskManager

    own = {*OFFLINE_TASKS, OFFLINE_GROUP}
    with only_errors("lm_eval"):  # it warns about each task whose items a function makes, and names in its own index
        # The index of lm-eval's own tasks takes many seconds: it is not made without need.
        manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=not own.issuperset(names))
        for name in names:
            if name not in manager.all_tasks:
                raise ValueError(f"there is no task {name!r}; {_near(name, manager.all_tasks)}")
        loaded = [task for name in names for task in _load(manager, name)]
    _check_repeated([task for each in loaded for task in each.tasks])
    return loaded


def _check_repeated(names: Sequence[str]) -> None:
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is named more than once; name every task once")


def _load(manager: Any, name: str) -> list[LoadedTask]:
    try:
        found = manager.load([name])
    except Exception as error:  # a task runs code of its own, and the Hub's client has many ways to fail
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(
            f"the data of task {name!r} cannot be loaded: {type(error).__name__}: {reason}; tasks that need no network "
            f"are {', '.join(OFFLINE_TASKS)}"
        ) from error
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    group = found["groups"].get(name)
    if group is not None and group.has_aggregation:
        return [LoadedTask(name, found["tasks"], found["groups"])]
    return [LoadedTask(task, {task: made}, {}) for task, made in found["tasks"].items()]


def _near(name: str, known: Sequence[str]) -> str:
    if close := difflib.get_close_matches(name, known, n=4):
        return f"did you mean {' or '.join(close)}?"
    others = "`python -m quad_modifiers.tools.evaluation ls tasks` lists all"
    return f"offline tasks are {', '.join(OFFLINE_TASKS)}; {others}"
