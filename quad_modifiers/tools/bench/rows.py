"""The rows of the quality table: what is compared, and how; and the texts that perplexity is measured on."""

from collections.abc import Callable
from dataclasses import dataclass

from quad_modifiers.data import news_articles, stdlib_code, wikipedia_articles

# None of the texts calibrates or trains.
WIKIPEDIA = "Wikipedia, held out"
NEWS = "news (Lee corpus)"
CODE = "Python code, held out"

TEXTS: dict[str, Callable[[], list[str]]] = {
    WIKIPEDIA: lambda: wikipedia_articles("held_out"),
    NEWS: news_articles,
    CODE: lambda: stdlib_code("held_out"),
}

_PEER = """
peer_stage:
  peer_modifiers:
    SpinQuantModifier:
      rotations: [R1, R2, R4]
      transform_type: random-hadamard
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}
          input_activations: {num_bits: 4, type: int, symmetric: true, strategy: token, dynamic: true}
"""

_STOCK_GPTQ = """
stock_stage:
  stock_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: channel}
"""

_STOCK_SCHEME = """
peer_stage:
  peer_modifiers:
    GPTQModifier: {ignore: [lm_head], %s}
"""
_STOCK_GROUP = "config_groups: {group_0: {targets: [Linear], weights: {num_bits: 4, type: int, symmetric: true, %s}%s}}"
_STOCK_INPUTS = ", input_activations: {num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true}"

_OWN_GPTQ = """
quad_stage:
  quad_modifiers:
    OutlierSplitGPTQ: {bits: 4}
"""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    title: str  # title in the table
    recipe: str | None  # name or text of a recipe; None measures the model as it is
    # the checkpoint is then distilled from the original and merged, as `quad finetune --merge` does
    tuned: bool = False


HEADLINE = ("quad_w4a4", "quad_w4a4a8")  # measured with every seed, the other rows with the first
SEEDS = (0, 1, 2)

QUALITY = {
    "full_precision": Row("full precision (bf16)", None),
    "rtn_w4a4": Row("RTN W4A4", "rtn_w4a4"),
    "spinquant_gptq_w4a4": Row("llm-compressor SpinQuant (R1, R2, R4) + GPTQ, W4A4", _PEER),
    "gptq_nvfp4": Row("llm-compressor GPTQ, NVFP4", _STOCK_SCHEME % "scheme: NVFP4, targets: [Linear]"),
    "gptq_w4a8": Row(
        "llm-compressor GPTQ, W4A8 per channel and token",
        _STOCK_SCHEME % (_STOCK_GROUP % ("strategy: channel", _STOCK_INPUTS)),
    ),
    "gptq_w4a16_g64": Row(  # groups of 128 do not divide SmolLM2's widths
        "llm-compressor GPTQ, W4A16 in groups of 64",
        _STOCK_SCHEME % (_STOCK_GROUP % ("strategy: group, group_size: 64", "")),
    ),
    "quarot_w4a4": Row("quarot_w4a4", "quarot_w4a4"),
    "frtq_w4a4": Row("frtq_w4a4", "frtq_w4a4"),
    "frtq_w4a4kv4": Row("frtq_w4a4kv4", "frtq_w4a4kv4"),
    "quad_w4a4": Row("quad_w4a4", "quad_w4a4"),
    "quad_w4a4_e8": Row("quad_w4a4_e8", "quad_w4a4_e8"),
    "quad_w4a4_g32": Row("quad_w4a4_g32", "quad_w4a4_g32"),
    "quad_nvfp4": Row("quad_nvfp4", "quad_nvfp4"),
    "quad_mxfp4": Row("quad_mxfp4", "quad_mxfp4"),
    "quad_w4a4_kv4": Row("quad_w4a4_kv4", "quad_w4a4_kv4"),
    "quad_w4a4_square": Row("quad_w4a4_square", "quad_w4a4_square"),
    "resq_w4a4": Row("resq_w4a4", "resq_w4a4"),
    "resq_w4a4kv4": Row("resq_w4a4kv4", "resq_w4a4kv4"),
    "smoothquant_quad_w4a4": Row("smoothquant_quad_w4a4", "smoothquant_quad_w4a4"),
    "quad_w4a4_finetuned": Row("quad_w4a4, then quad finetune", "quad_w4a4", tuned=True),
    "quad_w4a4a8": Row("quad_w4a4a8", "quad_w4a4a8"),
    "quad_w4a4a8_finetuned": Row("quad_w4a4a8, then quad finetune", "quad_w4a4a8", tuned=True),
    "quad_w4a8": Row("quad_w4a8", "quad_w4a8"),
    "quad_w4a8_g32": Row("quad_w4a8_g32", "quad_w4a8_g32"),
    "quad_w4a16": Row("quad_w4a16", "quad_w4a16"),
}

GPTQ_SPEED = {
    "stock_gptq": Row("llm-compressor GPTQModifier, W4A16 per channel", _STOCK_GPTQ),
    "own_gptq": Row("OutlierSplitGPTQ with its defaults, W4A16 per channel", _OWN_GPTQ),
}

ROWS = QUALITY | GPTQ_SPEED
