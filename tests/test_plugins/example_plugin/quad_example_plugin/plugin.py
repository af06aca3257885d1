"""What this distribution contributes: the entry point names this module."""

from pathlib import Path

import pluggy

hookimpl = pluggy.HookimplMarker("quad_modifiers")


@hookimpl
def quad_modifiers_modifiers() -> dict[str, str]:
    """Contribute `WeightClip`; the class is imported when a recipe needs it."""
    return {"WeightClip": "quad_example_plugin.weight_clip:WeightClip"}


@hookimpl
def quad_modifiers_recipe_folders() -> list[Path]:
    """Contribute the recipe `weight_clip_w4a16`."""
    return [Path(__file__).parent / "recipes"]
