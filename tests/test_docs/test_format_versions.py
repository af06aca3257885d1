"""What docs/reference/checkpoint-format.md says of versions is what `quad_modifiers.checkpoint.format` does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from quad_modifiers.checkpoint.format import FORMAT_VERSIONS, LinearFormat, QuadFormat, TableFormat, read_format

from .pages import ROOT

PAGE = ROOT / "docs" / "reference" / "checkpoint-format.md"
Section = dict[str, Any]

PLAIN: Section = {
    "in_features": 8, "out_features": 4, "outliers_per_block": 0, "block": 8, "keep_width": False, "hadamard": True,
    "bias": False, "weight": {"bits": 4}, "input": {"bits": 4, "clip_ratio": 1.0},
}  # fmt: skip
GROUPS = {"bits": 4, "group_size": 8, "sub_scale_bits": 4}
MODELS: dict[int, Section] = {
    1: {},
    2: {"head": TableFormat()},
    3: {"sections": {"key_basis": {"rank": 2}}},
    4: {},
    5: {},
    6: {
        "overrides": [{"role": "q_proj", "layers": [1], "weight": {"bits": 8}, "input": PLAIN["input"]}],
        "sections": {"kv_cache": {"bits": 4, "high": {"bits": 8}}},
    },
}
MODELS[7] = {"sections": {"kv_cache": {"bits": 4, "high": {"bits": 8}, "key_inverse": True}}}
MODELS[8] = MODELS[7]
FLOAT = {"bits": 4, "group_size": 16, "number_format": "nvfp4"}


LINEARS: dict[int, Section] = {
    4: {"weight": GROUPS},
    5: {"outliers_per_block": 2, "outlier": {"input_bits": 8}},
    7: {"input": {"bits": 4, "clip_ratio": 1.0, "symmetric": False}},
    8: {"in_features": 16, "block": 16, "weight": FLOAT, "input": FLOAT | {"clip_ratio": 1.0}},
}


def model_of(version: int, linear: Section | None = None) -> QuadFormat:
    linears = {"q_proj": LinearFormat(**(PLAIN | LINEARS.get(version, {}) | (linear or {})))}
    return QuadFormat.lowest(base_model_type="llama", residual_basis=None, linears=linears, **MODELS[version])


def fields_by_version() -> dict[int, set[str]]:
    """The fields of each version, by the table of the page."""
    text = PAGE.read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- fields by version -->\n(.*?)\n<!-- /fields by version -->", text, re.S)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    versions = [int(cell.removeprefix("version ")) for cell in head[1:]]
    assert all(cell in ("yes", "no") for row in rows for cell in row[1:])
    return {
        version: {row[0].strip("`") for row in rows if row[place] == "yes"} for place, version in enumerate(versions, 1)
    }


def written_fields(quad: QuadFormat) -> set[str]:
    section = quad.section()
    linear = section["linears"]["q_proj"]
    found = {f"linears.{name}" for name in ("terms", "outlier") if name in linear}
    found |= {f"linears.{part}.sub_scale_bits" for part in ("weight", "input") if "sub_scale_bits" in linear[part]}
    found |= {f"linears.{part}.number_format" for part in ("weight", "input") if "number_format" in linear[part]}
    found |= {"linears.input.four_over_six"} if "four_over_six" in linear["input"] else set()
    found |= {"linears.input.symmetric"} if "symmetric" in linear["input"] else set()
    cache = section.get("sections", {}).get("kv_cache", {})
    found |= {f"sections.kv_cache.{name}" for name in ("high", "key_inverse") if name in cache}
    return {*section, *found}


def test_the_page_has_the_fields_of_every_version() -> None:
    assert fields_by_version() == {version: written_fields(model_of(version)) for version in FORMAT_VERSIONS}


@pytest.mark.parametrize("version", FORMAT_VERSIONS)
def test_a_writer_takes_the_lowest_version(version: int) -> None:
    assert model_of(version).format_version == version
    with_term = model_of(version, {"terms": {"low_rank": {"rank": 2}}})
    assert with_term.format_version == max(version, 3)
    assert read_format(with_term.section()) == with_term
    assert with_term.section()["linears"]["q_proj"]["terms"] == {"low_rank": {"rank": 2}}


@pytest.mark.parametrize("version", FORMAT_VERSIONS)
def test_a_reader_refuses_fields_of_other_versions(version: int) -> None:
    fields = fields_by_version()
    others = set.union(*fields.values()) - fields[version] | {"surplus"}
    assert others - {"surplus"}
    for field in others:
        section = model_of(version).section()
        if field == "linears.terms":
            section["linears"]["q_proj"]["terms"] = {}
        elif field == "linears.outlier":
            section["linears"]["q_proj"]["outlier"] = None
        elif field == "linears.input.symmetric":
            section["linears"]["q_proj"]["input"]["symmetric"] = True
        elif field.endswith(".number_format"):
            section["linears"]["q_proj"][field.split(".")[1]]["number_format"] = "int"
        elif field == "linears.input.four_over_six":
            section["linears"]["q_proj"]["input"]["four_over_six"] = False
        elif field.startswith("sections.kv_cache."):
            section.setdefault("sections", {})["kv_cache"] = {"bits": 4, field.rpartition(".")[2]: None}
        else:
            empty = {"sections": {}, "outlier": {"bits": 16}, "overrides": []}
            section[field] = empty.get(field)
        with pytest.raises(ValueError, match=r"has no field|Extra inputs"):
            read_format(section)


def test_the_page_describes_every_field_of_a_linear() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("Each entry of `linears`:")[2].partition("\n\n## ")[0]
    described = {name for cell in re.findall(r"^\| (`.*?`) \|", text, re.M) for name in re.findall(r"`([\w.]+)`", cell)}
    fields = set(LinearFormat.model_fields)
    for part in ("weight", "input", "outlier"):
        (kind,) = (each for each in LinearFormat.model_fields[part].annotation.__args__ if each is not type(None))
        fields |= {f"{part}.{name}" for name in kind.model_fields}
    assert described == fields
