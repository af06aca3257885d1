"""The layers that are measured: those of five models, split as recipes/quad_w4a4.yaml splits them."""

from dataclasses import dataclass
from typing import Literal

from quad_kernels import InputQuantization, InputSplit

RANK = 64  # outlier coordinates of the residual stream, by which the extended basis widens it
O_PROJ_RANK_PER_HEAD = 8
DOWN_PROJ_RANK = 64
WEIGHT_BITS = 4
QUANTIZATION = InputQuantization(bits=4, clip_ratio=0.86)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the original model and the QUAD layer in its place.

    Attributes:
        inputs: input width of the original.
        outputs: output channels of the original.
        split: division of the QUAD layer's input.
        quad_outputs: output channels of the QUAD layer; those that write to the widened residual stream have more.
        bias: whether it has one.
    """

    inputs: int
    outputs: int
    split: InputSplit
    quad_outputs: int
    bias: bool = False


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        model: name of the model.
        name: name of the layer or module within it.
        kind: `linear`; `attention`: fused q, k, v and then o, without the attention between them; `mlp`: fused gate and
            up, SiLU and product, down.
        linears: linears in the order in which they run.
    """

    model: str
    name: str
    kind: Literal["linear", "attention", "mlp"]
    linears: tuple[Linear, ...]

    def __str__(self) -> str:
        return f"{self.model}/{self.name}"


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder block."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    qkv_bias: bool = False

    def linears(self) -> dict[str, Linear]:
        """The fused linears of a block."""
        stream = InputSplit(self.hidden + RANK, RANK)
        attention = self.heads * self.head_dim
        return {
            "qkv": Linear(
                self.hidden,
                (self.heads + 2 * self.kv_heads) * self.head_dim,
                stream,
                (self.heads + 2 * self.kv_heads) * self.head_dim,
                self.qkv_bias,
            ),
            "o": Linear(
                attention,
                self.hidden,
                InputSplit(attention, O_PROJ_RANK_PER_HEAD, self.head_dim, keep_width=True, hadamard=True),
                self.hidden + RANK,
            ),
            "gate_up": Linear(self.hidden, 2 * self.intermediate, stream, 2 * self.intermediate),
            "down": Linear(
                self.intermediate,
                self.hidden,
                InputSplit(self.intermediate, DOWN_PROJ_RANK, keep_width=True, hadamard=True),
                self.hidden + RANK,
            ),
        }


MODELS = {
    "llama-3-8b": Model(hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336),
    "llama-3.2-1b": Model(hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192),
    "qwen2.5-7b": Model(hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944, qkv_bias=True),
    "qwen2.5-0.5b": Model(hidden=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864, qkv_bias=True),
    "smollm2-135m": Model(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536),
    "toy": Model(hidden=128, heads=2, kv_heads=1, head_dim=64, intermediate=256, qkv_bias=True),
}
SQUARE = "4096x4096"  # not of a model: the residual of one U-type linear, for comparison with other measurements
REAL_MODELS = tuple(name for name in MODELS if name != "toy")


def cases(model: str) -> list[Case]:
    """The cases of a model: its linears, then its modules.

    Raises:
        ValueError: for an unknown name.
    """
    if model == SQUARE:
        return [Case(model, "linear", "linear", (Linear(4096, 4096, InputSplit(4096 + RANK, RANK), 4096),))]
    if model not in MODELS:
        raise ValueError(f"there is no model {model!r}; there are {', '.join([*MODELS, SQUARE])}")
    linears = MODELS[model].linears()
    return [
        *(Case(model, name, "linear", (linear,)) for name, linear in linears.items()),
        Case(model, "attention", "attention", (linears["qkv"], linears["o"])),
        Case(model, "mlp", "mlp", (linears["gate_up"], linears["down"])),
    ]
