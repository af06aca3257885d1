"""`quad recipes`: the recipes that are installed, their text, checking one, and suggesting one."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.tools.cli.errors import BAD_INPUT
from quad_modifiers.tools.cli.options import AsJson, recipe_names
from quad_modifiers.tools.cli.suggest import suggest
from quad_modifiers.tools.console import console, log_on_stderr, print_json, print_table

recipes = typer.Typer(
    help="List, show, check and suggest recipes.",
    epilog="Python: list_recipes, resolve_recipe and validate_recipe of quad_modifiers.recipe.",
)
recipes.command(
    "suggest",
    epilog="Example: quad recipes suggest outputs/SmolLM2-135M --bits 6 -o my_recipe.yaml\n\nPython: "
    "quad_modifiers.tools.suggestion.suggest_recipe(model, bits, ...)",
)(suggest)


@recipes.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show_list()


@recipes.command("list", epilog="Python: quad_modifiers.recipe.list_recipes()")
def show_list() -> None:
    """List the recipes of this package and of the installed plugins. What `quad recipes` does alone."""
    from quad_modifiers.plugins import recipe_files

    rows = [(name, _summary(each.path), str(each.distribution)) for name, each in sorted(recipe_files().items())]
    print_table(("recipe", "what it is", "from"), rows)


@recipes.command(epilog="Python: quad_modifiers.recipe.resolve_recipe(name).read_text()")
def show(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or path of a file.", autocompletion=recipe_names)],
) -> None:
    """Print a recipe; its header says what it does, what it costs and when to use it."""
    from quad_modifiers.recipe.resolve import read_recipe, resolve_recipe

    text = read_recipe(resolve_recipe(name))
    if sys.stdout.isatty():
        from rich.syntax import Syntax

        console().print(Syntax(text, "yaml", background_color="default"))
    else:
        typer.echo(text, nl=False)


@recipes.command(epilog="Python: quad_modifiers.recipe.validate_recipe(text_or_path)")
def validate(
    files: Annotated[
        list[str],
        typer.Argument(help="Paths or names of recipes.", metavar="FILE...", autocompletion=recipe_names),
    ],
    as_json: AsJson = False,
) -> None:
    """Check recipes without loading a model: structure, fields, order of the modifiers.

    Prints every problem with its line and remedy. The exit code is 2 if a recipe has an error.
    """
    from quad_modifiers.recipe import resolve_recipe, validate_recipe

    found = []
    for name in files:
        path = resolve_recipe(name)
        with log_on_stderr():
            problems = validate_recipe(path)
        sound = not any(problem.severity == "error" for problem in problems)
        found.append({"recipe": str(path), "sound": sound, "problems": [asdict(each) for each in problems]})
        if as_json:
            continue
        for problem in problems:
            typer.echo(problem.describe(str(path)))
        if sound:
            typer.echo(f"{path}: sound")
    if as_json:
        print_json(found)
    if not all(each["sound"] for each in found):
        raise typer.Exit(BAD_INPUT)


def _summary(path: Path) -> str:
    """Returns the first sentence of a recipe's header, or nothing if it has none."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    return first.removeprefix("#").strip().rstrip(".") if first.startswith("#") else ""
