"""`suggest_recipe`: a recipe of mixed precision for one model, within a budget of bits."""

import logging
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.data import CalibrationSource
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.output_folder import check_parent, replace_file, user_path
from quad_modifiers.passes.calibration_stream import work_on
from quad_modifiers.process_state import kept_apart
from quad_modifiers.recipe.problems import RecipeError
from quad_modifiers.recipe.validate import validate_recipe
from quad_modifiers.tools.inspection.evaluation_text import TextOptions
from quad_modifiers.tools.suggestion.allocation import allocated, check_budget, predicted
from quad_modifiers.tools.suggestion.base_recipe import BaseRecipe
from quad_modifiers.tools.suggestion.part_trials import ProjectedModel
from quad_modifiers.tools.suggestion.sensitivities import Kind, Part, Sensitivities, read_sensitivities
from quad_modifiers.tools.suggestion.suggested_text import with_overrides

logger = logging.getLogger(__name__)

DEFAULT_RECIPE = "quad_w4a4"


@dataclass(frozen=True)
class Budget:
    """What one kind of bits comes to.

    Attributes:
        kind: "weights", in bits that are stored per weight, or "inputs", in bits per multiplication.
        wanted: average that was asked for, at most.
        base: average of the recipe that was begun with.
        average: average of the suggestion.
        divergence_before: sum of the divergences of all parts alone under the recipe, nats.
        divergence_after: the same with the suggested bits.
    """

    kind: Kind
    wanted: float
    base: float
    average: float
    divergence_before: float
    divergence_after: float


@dataclass(frozen=True)
class Suggestion:
    """A recipe and what is known of it.

    Attributes:
        text: the recipe, with comments.
        budgets: of the weights, and of the inputs if they were asked for.
        wide: the parts that get 8 bits.
        sensitivities: what it was chosen by.
    """

    text: str
    budgets: tuple[Budget, ...]
    wide: tuple[Part, ...]
    sensitivities: Sensitivities


@kept_apart()
def suggest_recipe(
    model: str | Path,
    bits: float,
    *,
    input_bits: float | None = None,
    output: str | Path | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    kept: str | Path | None = None,
    keep: str | Path | None = None,
    dataset: CalibrationSource = None,
    text_column: str = "text",
    samples: int = 16,
    eval_windows: int = 2,
    seq_length: int = 512,
    seed: int = 0,
    split: str | None = None,
    dataset_config: str | None = None,
    options: LoadingOptions = DEFAULTS,
) -> Suggestion:
    """Chooses which linears of which blocks get 8 bits instead of the recipe's, within a budget.

    Each group of linears, in at most 16 runs of blocks, is rounded to nearest alone, at the recipe's bits and at 8;
    then those get 8 bits whose divergence falls most for what it costs. Nothing is drawn: the same arguments give the
    same recipe.

    Args:
        model: folder or Hub id of an unquantized causal language model.
        bits: average of what is stored per weight of the decoder linears, scales and outlier columns counted.
        input_bits: average over all multiplications of the bits of the input; None leaves the inputs to the recipe.
        output: file for the recipe, which must not exist; None writes none.
        recipe: name or path of the recipe to begin with.
        kept: file of an earlier run's `keep`, instead of measuring.
        keep: file for what was measured, so that other budgets need no measuring.
        dataset: text, as for `inspect_model`; with the seven arguments that follow it.
        text_column: see there.
        samples: windows for the projection.
        eval_windows: other windows, which the divergences are measured on.
        seq_length: see there.
        seed: see there.
        split: see there.
        dataset_config: see there.
        options: how the model is loaded.

    Raises:
        FileExistsError: if a file to be written exists.
        FileNotFoundError: if there is no such model, recipe or file.
        RecipeError: if the recipe cannot be used.
        ValueError: if a budget cannot be met, with the range that can; if the recipe's bits cannot be raised, what was
            kept is of another model or recipe, the model is of no supported architecture or quantized already, or there
            is not enough text.
        ModuleNotFoundError: if llm-compressor is not installed.
    """
    written = [user_path(each) for each in (output, keep) if each is not None]
    _check_files(written)
    if kept is not None and keep is not None:
        raise ValueError(f"what was kept in {kept} need not be kept again in {keep}; give one of the two")
    text = TextOptions(dataset, text_column, samples, eval_windows, seq_length, seed, split, dataset_config)
    base = BaseRecipe.read(recipe)
    opened = open_checkpoint(model, known_only=True, options=options)
    opened.need_unquantized("what a recipe is suggested for")
    wanted: dict[Kind, float] = {"weights": bits} if input_bits is None else {"weights": bits, "inputs": input_bits}
    if kept is not None:
        found = read_sensitivities(user_path(kept))
        _check_kept(found, base, opened, kept)
        _check_budgets(found, base, wanted)
    else:
        warn_of_length(opened.config, seq_length)
        with work_on(options.device):
            projected = ProjectedModel.of(opened, base, text)
            costs = projected.costs(of_inputs=input_bits is not None)
            _check_budgets(costs, base, wanted)
            found = projected.measured(costs)
    if keep is not None:
        replace_file(user_path(keep), found.model_dump_json(indent=1) + "\n")
    suggestion = _chosen(found, base, wanted)
    if output is not None:
        replace_file(user_path(output), suggestion.text)
    return suggestion


def _check_files(files: list[Path]) -> None:
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists; remove it or choose another file")
        check_parent(file)


def _check_kept(found: Sensitivities, base: BaseRecipe, opened: Opened, kept: str | Path) -> None:
    """Refuses what was measured of something else."""
    wanted = opened.architecture.model_type, opened.config.num_hidden_layers
    if wanted != (found.model_type, found.layers):
        raise ValueError(
            f"{kept} is of {found.model}, a {found.model_type} of {found.layers} blocks, and {opened.name} is a "
            f"{wanted[0]} of {wanted[1]}; measure it anew"
        )
    if found.recipe_digest != base.digest:
        raise ValueError(f"{kept} was measured with {found.recipe}, which was another text than that of {base.name}")


def _check_budgets(found: Sensitivities, base: BaseRecipe, wanted: dict[Kind, float]) -> None:
    for kind, bits in wanted.items():
        if not found.of(kind):
            raise ValueError(
                f"there is nothing to give {bits:g} bits to: {base.name} quantizes no {kind} with fewer than 8 bits, "
                "or what was kept was measured without them"
            )
        check_budget(found, kind, bits)


def _chosen(found: Sensitivities, base: BaseRecipe, wanted: dict[Kind, float]) -> Suggestion:
    wide: list[Part] = []
    budgets: list[Budget] = []
    for kind, budget in wanted.items():
        chosen = allocated(found, kind, budget)
        before, after = predicted(found.of(kind), chosen)
        budgets.append(Budget(kind, budget, found.average(kind), found.average(kind, chosen), before, after))
        wide += chosen
    text = with_overrides(base.text, _header(found, budgets), wide)
    problems = [each for each in validate_recipe(text) if each.severity == "error"]
    if problems:  # of a recipe of the user that becomes unsound with overrides
        raise RecipeError("the suggested recipe", problems)
    return Suggestion(text, tuple(budgets), tuple(wide), found)


def _header(found: Sensitivities, budgets: list[Budget]) -> list[str]:
    what = {"weights": "bits per weight, scales and outliers counted", "inputs": "bits of an input per multiplication"}
    lines = [f"{found.recipe} with 8 bits where they gain most on {Path(found.model).name}.", ""]
    for each in budgets:
        lines.append(f"{each.kind}: {each.average:.3f} {what[each.kind]} ({each.base:.3f} in {found.recipe});")
        lines.append(
            f"  divergence of the parts alone, rounded to nearest: {each.divergence_after:.4f} nats in all, "
            f"{each.divergence_before:.4f} in {found.recipe}"
        )
    text = f"{found.windows} windows of {found.window_length} tokens, seed {found.seed}, of {found.text}"
    return [*lines, *wrap(f"Measured on {text}.", width=108)]
