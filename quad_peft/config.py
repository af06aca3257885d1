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
        base_fingerprint: fingerprint of the adapter's checkpoint; filled in by the model.

    Raises:
        ValueError: for a field of `LoraConfig` that an outlier adapter cannot honour.
    """

    r: int = field(default=0, metadata={"help": "Taken from the model when 0."})
    lora_alpha: int = field(default=0, metadata={"help": "Equal to the rank: the adapter is not scaled."})
    task_type: str | TaskType | None = field(default=TaskType.CAUSAL_LM, metadata={"help": "Of the PEFT model."})
    train_weight_scales: bool = field(default=False, metadata={"help": "Also train the scales of the 4-bit weights."})
    base_fingerprint: str | None = field(default=None, metadata={"help": "Of the checkpoint it belongs to."})

    def __post_init__(self) -> None:
        """Checks the fields inherited from `LoraConfig`."""
        super().__post_init__()
        for name, allowed in _UNSUPPORTED.items():
            value = getattr(self, name, allowed[0])
            if value not in allowed:
                raise ValueError(
                    f"an outlier adapter has no {name} (it is {value!r}); leave it at {allowed[0]!r}, or train a "
                    "LoraConfig, which works on QUAD checkpoints too"
                )
        if self.r < 0:
            raise ValueError(f"r must be 0 (taken from the model) or the model's rank, not {self.r}")
