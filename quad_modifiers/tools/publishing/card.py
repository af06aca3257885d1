"""The model card: README.md of a published checkpoint.

A new card is generated as a whole. Its sections are between markers, so that people can edit around them: later runs
replace what is between the markers and nothing else. A card that somebody wrote keeps its text; it gets the metadata
that it lacks, and a section where its author put the markers of one.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from quad_modifiers.output_folder import replace_file
from quad_modifiers.records.evaluation_record import Evaluation, task_scores
from quad_modifiers.records.inventory import Inventory
from quad_modifiers.records.widths import width_tags
from quad_modifiers.tools.publishing.base_license import UNKNOWN, License
from quad_modifiers.tools.publishing.contents import CARD_NAME
from quad_modifiers.tools.publishing.sections import write_sections

OUR_TAG = "quad-modifiers"
_BEGIN, _END = "<!-- quad-modifiers: {} -->", "<!-- /quad-modifiers: {} -->"
_MARKER = re.compile(r"<!-- (/?)quad-modifiers: ([\w-]+) -->")


def build_card(
    folder: Path,
    inventory: Inventory,
    repo_id: str,
    base_model: str | None,
    license: License,
    evaluation: Evaluation | None,
) -> str:
    """Returns the text of the card, made anew or from the one in the folder.

    Raises:
        ValueError: if the card in the folder has broken metadata or markers.
    """
    sections = write_sections(folder, inventory, repo_id, base_model, license, evaluation)
    existing = folder / CARD_NAME
    metadata = _metadata(inventory, repo_id, base_model, license, evaluation)
    if not existing.is_file():
        body = "\n\n".join(_marked(name, text) for name, text in sections.items())
        return _assemble(metadata, f"# {repo_id.rpartition('/')[2]}\n\n{body}\n")
    own, text = read_card(existing)
    generated = _check_markers(existing, text)
    for name in generated & sections.keys():
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        text = before + _marked(name, sections[name]) + rest.partition(end)[2]
    return _assemble(_merged(own, metadata, is_ours=bool(generated)), text)


def write_card(folder: Path, text: str) -> None:
    """Writes README.md, by way of a temporary file; does nothing if it holds that text already."""
    target = folder / CARD_NAME
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return
    replace_file(target, text)


def read_card(file: Path) -> tuple[dict[str, Any], str]:
    """Returns metadata and text of a card, both empty if there is none.

    Raises:
        ValueError: if the metadata cannot be parsed.
    """
    if not file.is_file():
        return {}, ""
    content = file.read_text(encoding="utf-8")
    if not content.lstrip().startswith("---"):
        return {}, content
    try:
        card = ModelCard(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata at the head of {file} cannot be read: {error}; correct them") from error
    return card.data.to_dict(), card.text.lstrip("\n")


def _metadata(
    inventory: Inventory, repo_id: str, base_model: str | None, license: License, evaluation: Evaluation | None
) -> dict[str, Any]:
    further: dict[str, Any] = {"base_model_relation": "quantized"} if base_model else {}
    kind = "compressed-tensors" if inventory.quad is None else "quad"
    data = ModelCardData(
        base_model=base_model,
        license=license.identifier,
        license_name=license.name,
        license_link=license.link,
        # A QUAD checkpoint needs this package; naming transformers would make the Hub show code that does not run.
        library_name="transformers" if inventory.quad is None else OUR_TAG,
        pipeline_tag="text-generation",
        tags=[OUR_TAG, *([] if inventory.is_plain else [kind, *width_tags(inventory)])],
        model_name=repo_id.rpartition("/")[2] if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
        **further,
    )
    return data.to_dict()


def _eval_results(evaluation: Evaluation) -> list[EvalResult] | None:
    numbers = [(one.text, "perplexity", one.value) for one in evaluation.perplexity]
    numbers += [(score.task, score.metric, score.value) for score in task_scores(evaluation)]
    return [EvalResult("text-generation", name, name, metric, value) for name, metric, value in numbers] or None


def _merged(own: dict[str, Any], ours: dict[str, Any], is_ours: bool) -> dict[str, Any]:
    """Returns the author's metadata, with a license that is better known now and the results of a generated card."""
    merged = {**ours, **{key: value for key, value in own.items() if value is not None}}
    merged["tags"] = list(dict.fromkeys([*(own.get("tags") or []), *ours["tags"]]))
    if own.get("license") == UNKNOWN:
        merged["license"] = ours["license"]
    if is_ours:
        merged.pop("model-index", None)
        merged.update({key: ours[key] for key in ("model-index", "base_model", "base_model_relation") if key in ours})
    return merged


def _assemble(metadata: dict[str, Any], text: str) -> str:
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip()
    return f"---\n{head}\n---\n\n{text}"


def _marked(name: str, text: str) -> str:
    return f"{_BEGIN.format(name)}\n{text.strip()}\n{_END.format(name)}"


def _check_markers(file: Path, text: str) -> set[str]:
    """Returns the names of the sections; refuses a marker without partner, twice, or inside another section."""
    found: set[str] = set()
    inside: str | None = None
    for match in _MARKER.finditer(text):
        closing, name = bool(match[1]), match[2]
        if closing != (inside is not None) or (closing and name != inside) or (not closing and name in found):
            raise ValueError(f"{file}: the marker {match[0]} has no partner or occurs twice; correct the card")
        inside = None if closing else name
        found.add(name)
    if inside is not None:
        raise ValueError(f"{file}: {_BEGIN.format(inside)} has no {_END.format(inside)}; correct the card")
    return found
