"""Configuration of an outlier adapter."""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, TaskType

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (0, 0.0),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "init_lora_weights": (True, False),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "ensure_weight_tying": (False,),
}


@dataclass
class OutlierLoraConfig(LoraConfig):
    """A LoRA on the outlier weights of a QUAD checkpoint: A selects the outlier coordinates, B is the change.

    Rank, alpha and targets come from the model when the adapter is added to it. The other fields of `LoraConfig` keep
    their meaning; those that change the computation (dropout, DoRA, rank-stabilised scaling, special initialisations)
    are refused.

    Args:
        r: rank, which must be the model's; 0 takes the rank of each role from the model.
        train_weight_scales: True to train also a change of the residual weights' scales. Such an adapter is no
            longer a LoRA: it can be merged, but vLLM does not serve it.
        train_weights: True to train also changes of the weights' integers, in float32: 16 bytes of memory per weight.
            Such an adapter can be merged only, too.
        base_fingerprint: fingerprint of the adapter's checkpoint; filled in by the model.

    Raises:
        ValueError: for a field of `LoraConfig` that an outlier adapter cannot honour.
    """

    r: int = field(default=0, metadata={"help": "Taken from the model when 0."})
    lora_alpha: int = field(default=0, metadata={"help": "Equal to the rank: the adapter is not scaled."})
    task_type: str | TaskType | None = field(default=TaskType.CAUSAL_LM, metadata={"help": "Of the PEFT model."})
    train_weight_scales: bool = field(default=False, metadata={"help": "Also train the scales of the 4-bit weights."})
    train_weights: bool = field(default=False, metadata={"help": "Also train the integers of the 4-bit weights."})
    base_fingerprint: str | None = field(default=None, metadata={"help": "Of the checkpoint it belongs to."})

    def __post_init__(self) -> None:
        """Checks the fields inherited from `LoraConfig`."""
        super().__post_init__()
        refuse_fields(
            self, _UNSUPPORTED, "an outlier adapter", "train a LoraConfig, which works on QUAD checkpoints too"
        )
        if self.r < 0:
            raise ValueError(f"r must be 0 (taken from the model) or the model's rank, not {self.r}")


def refuse_fields(config: Any, allowed: dict[str, tuple[Any, ...]], what: str, remedy: str) -> None:
    """Refuses a config by the first of its fields that has not one of the allowed values.

    Args:
        config: any config; a field that its PEFT version does not have is allowed.
        allowed: allowed values by field, the usual one first.
        what: what has no such field, for the error.
        remedy: what to do instead of leaving the field alone, for the error.

    Raises:
        ValueError: naming field, value and remedy.
    """
    for name, values in allowed.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise ValueError(f"{what} has no {name} (it is {value!r}); leave it at {values[0]!r}, or {remedy}")
