"""What an adapter may name in a QUAD model.

All of it is looked at before PEFT puts its first layer into the model: PEFT would leave it half adapted, and would take
modules whose packed weights it cannot train.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from quad_modifiers.nn.packed_table import is_packed
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft.config import OutlierLoraConfig, refuse_fields
from quad_peft.layer import PACKED_OUTLIER, QuadLoraLayer

logger = logging.getLogger(__name__)

_PLAIN = "a plain floating-point model, which quantization_config=QuadQuantizationConfig(dequantize=True) gives"
_REMEDY = "leave it out, or load the checkpoint as " + _PLAIN
# Fields of a LoraConfig that need a weight in floating point, or a layer of PEFT's own, with the values they may have.
_NEEDS_STOCK_LAYERS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "init_lora_weights": (True, False, "gaussian"),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


def set_usual_targets(config: Any, model: nn.Module, usual: dict[str, Any]) -> None:
    """Fills in the targets of a config without any, those that PEFT takes for the checkpoint's stock architecture.

    Args:
        config: config of any PEFT method.
        model: QUAD model, whose own model type PEFT does not know.
        usual: PEFT's targets by model type, of that method.
    """
    if getattr(config, "target_modules", ()) is not None or getattr(config, "target_parameters", None):
        return
    for ancestor in type(getattr(model, "config", None)).__mro__:
        targets = usual.get(ancestor.__dict__.get("model_type", ""))
        if targets is not None:
            config.target_modules = targets if isinstance(targets, str) else set(targets)
            return


def check_targets(config: Any, model: nn.Module) -> None:
    """Checks what a config names in a QUAD model; names that match nothing are warned of.

    Args:
        config: config of any PEFT method, its targets filled in.
        model: model with QUAD layers, adapted already or not.

    Raises:
        ValueError: naming the first module that the method cannot adapt or train, or the field that it cannot honour.
    """
    if config.peft_type == PeftType.XLORA:
        raise ValueError(f"XLoraConfig mixes adapters in PEFT's own layers alone; load the checkpoint as {_PLAIN}")
    modules = dict(_reachable(model))
    targeted = list(_targeted(config, modules))
    layers = [name for name in targeted if isinstance(modules[name], QuadLinear | QuadLoraLayer)]
    kind = type(config).__name__
    if layers and config.peft_type != PeftType.LORA:
        raise ValueError(
            f"{kind} cannot adapt {layers[0]}, whose weight is quantized; train a LoraConfig or an OutlierLoraConfig, "
            f"or load the checkpoint as {_PLAIN}"
        )
    if layers and not isinstance(config, OutlierLoraConfig):
        refuse_fields(config, _NEEDS_STOCK_LAYERS, "a LoRA on quantized layers", "load the checkpoint as " + _PLAIN)
    if isinstance(config, OutlierLoraConfig):
        for name in layers:
            module: Any = modules[name]
            base = module.get_base_layer() if isinstance(module, QuadLoraLayer) else module
            if base.packed_outlier is not None:
                raise ValueError(f"{kind} cannot adapt {name}: {PACKED_OUTLIER}")
    for name in targeted:
        if is_packed(modules[name]):
            raise ValueError(f"{kind} cannot adapt {name}, an 8-bit table; {_REMEDY}")
    _check_parameters(config, modules)
    _check_trained_whole(config, model, modules)


def _reachable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules by name, those inside of an adapted layer left out, as PEFT does."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(adapted):
            yield name, module
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)


def _targeted(config: Any, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yields the names that a config targets."""
    targets = getattr(config, "target_modules", None)
    if targets is None or config.peft_type == PeftType.TRAINABLE_TOKENS:
        return
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, QuadLinear))
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    for name in modules:
        hit = check_target_module_exists(config, name)
        if name.startswith(inside) and (hit or everything):
            raise ValueError(
                f"target_modules reaches inside of a QUAD layer ({name}; 'all-linear' does so); name the layers "
                "themselves, such as ['q_proj', 'v_proj']"
            )
        if hit:
            yield name
    if not isinstance(targets, str):
        _warn_of_unmatched("target_modules", targets, modules, ".")


def _check_parameters(config: Any, modules: dict[str, nn.Module]) -> None:
    """Refuses to wrap a parameter that a QUAD layer reads by itself."""
    wanted = tuple(getattr(config, "target_parameters", None) or ())
    for name, module in modules.items():
        inside = module.named_parameters() if isinstance(module, QuadLinear) else ()
        for below, _ in inside:
            if f"{name}.{below}".endswith(wanted):
                raise ValueError(
                    f"target_parameters reaches {name}.{below} inside of a QUAD layer; name the layer in target_modules"
                )


def _check_trained_whole(config: Any, model: Any, modules: dict[str, nn.Module]) -> None:
    """Refuses modules to be trained and saved whole whose weights are packed."""
    wanted = tuple(getattr(config, "modules_to_save", None) or ())
    for name in (name for name in modules if name.endswith(wanted)):
        for below, module in modules[name].named_modules(prefix=name):
            if isinstance(module, QuadLinear) or is_packed(module):
                raise ValueError(f"modules_to_save: {name} cannot be trained, for {below} holds integers; {_REMEDY}")
    _warn_of_unmatched("modules_to_save", wanted, modules, "")
    tokens = getattr(config, "trainable_token_indices", None)
    rows = tuple(tokens) if isinstance(tokens, dict) else ()
    if config.peft_type == PeftType.TRAINABLE_TOKENS:
        targets = config.target_modules
        rows = (targets,) if isinstance(targets, str) else tuple(targets or ())
        tokens = tokens or rows or True
    if tokens and not rows and is_packed(model.get_input_embeddings()):
        rows = tuple(name for name, module in modules.items() if module is model.get_input_embeddings())
    for name, module in modules.items():
        if name.endswith(rows) and is_packed(module):
            raise ValueError(f"rows of {name}, an 8-bit table, cannot be trained; {_REMEDY}")


def _warn_of_unmatched(field: str, wanted: Iterable[str], modules: dict[str, nn.Module], before: str) -> None:
    unmatched = [each for each in wanted if not any(n == each or n.endswith(before + each) for n in modules)]
    if unmatched:
        logger.warning("%s: nothing in the model is named %s; there it has no effect", field, ", ".join(unmatched))
