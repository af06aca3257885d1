"""Finds a recipe by path, or by name among the recipe folders that the plugins contribute."""

from pathlib import Path
from typing import TYPE_CHECKING

from quad_modifiers.plugins.contributions import recipe_files
from quad_modifiers.plugins.modifier_classes import near_names

if TYPE_CHECKING:
    from quad_modifiers.plugins.manager import QuadPluginManager


def resolve_recipe(name_or_path: str | Path, manager: "QuadPluginManager | None" = None) -> Path:
    """Returns the file of a recipe given as a path or by name.

    An existing file wins. Otherwise `quad_w4a4`, `quad_w4a4.yaml` and `recipes/quad_w4a4.yaml` all mean the
    recipe `quad_w4a4` of the installed package or of a plugin.

    Raises:
        FileNotFoundError: if there is neither such a file nor a recipe of that name.
        PluginError: if a plugin's recipe folder is missing, or two plugins claim one recipe name.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    recipes = list_recipes(manager)
    name = path.name.removesuffix(".yaml").removesuffix(".yml")
    if path.parent in (Path("."), Path("recipes")) and name in recipes:
        return recipes[name]
    what = "is a folder" if path.is_dir() else "is neither a file nor the name of a recipe"
    near = near_names(name, list(recipes))
    if name in recipes:
        hint = f"; the recipe {name!r} is found by its name alone."
    else:
        hint = f"; {near}" if near.endswith("?") else "."
    raise FileNotFoundError(
        f"recipe {str(name_or_path)!r} {what}{hint} Give a path of a YAML file, or one of the names: "
        f"{', '.join(sorted(recipes)) or 'none found'}"
    )


def read_recipe(path: Path) -> str:
    """Returns the text of a recipe file, which must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def list_recipes(manager: "QuadPluginManager | None" = None) -> dict[str, Path]:
    """Returns the file of every recipe that the plugins contribute, by name.

    Raises:
        PluginError: if a plugin's recipe folder is missing, or two plugins claim one recipe name.
    """
    return {name: contributed.path for name, contributed in recipe_files(manager).items()}


def builtin_recipe_folder() -> Path:
    """Returns the folder of this project's own recipes: package data if installed, `recipes/` in a checkout.

    Raises:
        FileNotFoundError: if neither exists.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "_recipes", package.parent / "recipes")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"the recipes of quad_modifiers are in none of {', '.join(map(str, candidates))}; install the package again"
    )
