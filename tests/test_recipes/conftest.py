"""Small stand-ins for the modifiers, contributed by a hand-made plugin: the rules are tested alone."""

from __future__ import annotations

import sys
import types
from typing import Any, ClassVar, Literal

import pytest
from llmcompressor.modifiers import Modifier
from pydantic import Field, model_validator

from quad_modifiers.plugins import Distribution, QuadPluginManager, hookimpl


class StandIn(Modifier):
    """A modifier that does nothing."""

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True


class SVDOutlierProjection(StandIn):
    recipe_role: ClassVar[str] = "project"
    rank: int = Field(default=64, ge=0, description="outlier coordinates kept in full precision")
    basis: Literal["extended", "square"] = "extended"
    online_rotation: list[Literal["o_proj", "down_proj"]] = Field(default_factory=list)
    down_proj_rank: int = 0


class DynamicActQuant(StandIn):
    recipe_role: ClassVar[str] = "quantize_activations"
    u_type_bits: int = 4
    strategy: Literal["token", "group"] = "token"
    group_size: int | None = None

    @model_validator(mode="after")
    def group_has_size(self) -> DynamicActQuant:
        if self.strategy == "group" and self.group_size is None:
            raise ValueError("strategy group needs group_size; add group_size: 128")
        return self


class OutlierSplitGPTQ(StandIn):
    recipe_role: ClassVar[str] = "quantize_weights"
    bits: int = 4
    ignore: list[str] = Field(default_factory=lambda: ["lm_head"])


class Tuner(StandIn):
    recipe_role: ClassVar[str] = "tune"


class Wanderer(StandIn):
    recipe_role: ClassVar[str] = "wander"


STAND_INS = {each.__name__: each for each in (SVDOutlierProjection, DynamicActQuant, OutlierSplitGPTQ, Tuner, Wanderer)}


@pytest.fixture
def stand_ins() -> dict[str, type[StandIn]]:
    """The stand-in classes by name."""
    return STAND_INS


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> QuadPluginManager:
    """A plugin manager whose only plugin contributes the stand-ins."""
    monkeypatch.setitem(sys.modules, "stand_in_modifiers", types.SimpleNamespace(**STAND_INS))
    plugin = types.ModuleType("stand_in_plugin")

    @hookimpl
    def quad_modifiers_modifiers() -> dict[str, str]:
        return {name: f"stand_in_modifiers:{name}" for name in STAND_INS}

    plugin.quad_modifiers_modifiers = quad_modifiers_modifiers  # type: ignore[attr-defined]
    manager = QuadPluginManager()
    manager.add(plugin, Distribution("stand-ins", "1.0"), "stand_ins")
    return manager
