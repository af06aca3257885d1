"""Model classes of QUAD checkpoints: stock transformers models under a `model_type` that only this package registers.

Stock transformers would only warn about an unknown quant_method and fill the weights it cannot find with random
numbers. A model type that it does not know stops it instead, and the type's text tells the reader what to install.
`LlamaForCausalLM.from_pretrained` and its like do not look at the model type; for them a field that no runtime needs
holds the same text where a number belongs, which stock config classes refuse with the text in their message.
"""

import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from quad_modifiers.checkpoint.quad_model import QuadModel

INSTALL_HINT = "pip install quad-modifiers, then import quad_modifiers"
TRIPWIRE_FIELD = "initializer_range"  # only a new, untrained model needs it

logger = logging.getLogger(__name__)

_publish: Callable[..., Any] | None = None


def quad_model_type(base: str) -> str:
    """`model_type` of a QUAD checkpoint of the stock type `base`."""
    return f"quad_{base} ({INSTALL_HINT})"


def register_models(model_types: list[str]) -> None:
    """Registers a config and a causal LM class for each stock model type; calling it again changes nothing."""
    for base in model_types:
        if base not in CONFIG_MAPPING or CONFIG_MAPPING[base] not in MODEL_FOR_CAUSAL_LM_MAPPING:
            warnings.warn(
                f"a plugin contributes the architecture {base!r}, which transformers does not know", stacklevel=2
            )
        elif quad_model_type(base) not in CONFIG_MAPPING:
            _register(base)


def set_tripwire(config: dict[str, Any]) -> None:
    """Puts the installation hint where stock config classes expect a number."""
    config[TRIPWIRE_FIELD] = f"this is a QUAD checkpoint: {INSTALL_HINT} and load it by AutoModelForCausalLM"


def publish_by(publish: Callable[..., Any]) -> None:
    """Sets the function behind `push_to_hub`: publishing is a tool, which stands above this module."""
    global _publish
    _publish = publish


def push_to_hub(model: Any, repo_id: str, **arguments: Any) -> Any:
    """Stands in for `PreTrainedModel.push_to_hub`; see `quad_modifiers.tools.publishing.push_to_hub`."""
    assert _publish is not None, "the import of transformers connects quad_modifiers, which sets it"
    return _publish(model, repo_id, **arguments)


def _register(base: str) -> None:
    config_class = CONFIG_MAPPING[base]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]

    def from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a config.json without the tripwire.

        `quantization_config=None` counts as not given: stock configs would lose the checkpoint's own by it, and the
        model would be filled with random numbers.
        """
        if kwargs.get("quantization_config") is None:
            kwargs.pop("quantization_config", None)
        if isinstance(config_dict.get(TRIPWIRE_FIELD), str):
            config_dict = {key: value for key, value in config_dict.items() if key != TRIPWIRE_FIELD}
        return super(quad_config, cls).from_dict(config_dict, **kwargs)

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        """The text of config.json, with the tripwire: a loaded model that is saved again must keep it."""
        config = json.loads(super(quad_config, self).to_json_string(use_diff=use_diff))
        set_tripwire(config)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    quad_config: Any = strict(
        type(
            f"Quad{config_class.__name__}",
            (config_class,),
            {
                "__doc__": f"{config_class.__name__} of a QUAD checkpoint; the heads need not divide hidden_size.",
                "__module__": __name__,
                "model_type": quad_model_type(base),
                # head_dim is explicit, so the stock rule that the heads divide hidden_size does not apply.
                "validate_architecture": lambda self: None,
                # Phi-3's wants as many factors of "longrope" as a head has that hidden_size is divided by.
                "validate_rope": lambda self: None,
                "from_dict": classmethod(from_dict),
                "to_json_string": to_json_string,
            },
        )
    )

    quad_model = type(
        f"Quad{model_class.__name__}",
        (QuadModel, model_class),
        {
            "__doc__": f"{model_class.__name__} of a QUAD checkpoint.",
            "__module__": __name__,
            "config_class": quad_config,
            "push_to_hub": push_to_hub,
        },
    )
    globals()[quad_config.__name__] = quad_config
    globals()[quad_model.__name__] = quad_model
    AutoConfig.register(quad_model_type(base), quad_config)
    AutoModelForCausalLM.register(quad_config, quad_model)
    for auto in _other_auto_classes():
        auto.register(quad_config, _refusal(quad_config, auto.__name__))


def _other_auto_classes() -> list[Any]:
    """The auto classes of transformers whose models a QUAD checkpoint is not."""
    found: list[Any] = [value for value in vars(modeling_auto).values() if isinstance(value, type)]
    kinds = [value for value in found if issubclass(value, _BaseAutoModelClass) and value._model_mapping is not None]
    return [kind for kind in kinds if not issubclass(kind, AutoModelForCausalLM)]


def _refusal(config_class: Any, asked: str) -> type:
    """A model class that cannot be loaded; its error names the one that can."""

    def refuse(cls: type, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"a QUAD checkpoint holds a causal language model, and {asked} cannot load it; use AutoModelForCausalLM. "
            "Its hidden states are in a basis of their own, so no other head or embedding can be put on them"
        )

    load: Any = classmethod(refuse)
    return type(f"No{asked}", (), {"config_class": config_class, "from_pretrained": load, "_from_config": load})
