"""Sphinx: the Markdown pages as they stand, and the API reference from docstrings. `make docs` builds it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")  # read when it is imported

import quad_modifiers

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "QUAD Modifiers"
copyright = "the QUAD Modifiers authors"
release = quad_modifiers.__version__
html_theme = "furo"
html_title = f"{project} {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4  # GitHub's own anchors, which the pages link to

default_role = "code"  # docstrings have Markdown's single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True  # one list of attributes, under the class
# Extras that `make venv` need not have installed: the pages are the same without them.
autodoc_mock_imports = [name for name in ("lm_eval", "matplotlib", "peft") if find_spec(name) is None]
# pydantic's own, in every modifier
autodoc_default_options = {"exclude-members": "model_config, model_post_init"}


def setup(app: Sphinx) -> None:
    """Connect what follows to Sphinx's events."""
    app.connect("source-read", _add_contents)
    app.connect("autodoc-process-signature", _own_fields)
    app.connect("autodoc-skip-member", _skip_fields_of_tuples)


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give pages that list others, which GitHub shows as they are, the hidden tables of contents that Sphinx wants."""
    if page in ("index", "reference/api"):
        source[0] += "".join(_contents(source[0]))


def _contents(text: str) -> Iterator[str]:
    """Yield a table of contents for each section of `text` that lists pages."""
    for section in re.split(r"^#+ ", text, flags=re.M)[1:]:
        caption, _, body = section.partition("\n")
        pages = [match[1] for match in re.finditer(r"^- \[[^]]*\]\(([\w/-]+)\.(?:md|rst)\)", body, re.M)]
        if pages:
            yield "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def _own_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave llm-compressor's lifecycle fields out of a modifier's signature: a recipe does not write them."""
    fields = getattr(thing, "model_fields", None)
    if what != "class" or fields is None:
        return signature, returns
    inherited = set().union(*(getattr(base, "model_fields", ()) for base in thing.__mro__[1:]))
    own = [f"{key}{'' if field.is_required() else f'={field.default!r}'}" for key, field in fields.items()]
    return f"({', '.join(text for text in own if text.partition('=')[0] not in inherited)})", returns


def _skip_fields_of_tuples(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the descriptors of named tuples, whose docstrings describe the fields."""
    return True if str(getattr(thing, "__doc__", "")).startswith("Alias for field number") else None
