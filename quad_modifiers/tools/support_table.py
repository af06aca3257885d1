"""What runs with what: model types, recipes and runtimes, as the code declares them.

`quad support` prints it. `python -m quad_modifiers.tools.support_table` prints the page docs/reference/support.md. The
tests go through the same cells, so the page claims what a test runs.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES, Architecture
from quad_modifiers.nn.native_decode import STOCK_DECODERS
from quad_modifiers.recipe import builtin_recipe_folder
from quad_modifiers.vllm_plugin import MODEL_CLASSES

# Saved as plain compressed-tensors: transformers needs nothing of this package to load them.
PLAIN_RECIPES = ("quad_w4a4_portable", "rtn_w4a4")
FLOAT_INPUTS = ("quad_w4a16",)  # the native blocks take quantized inputs only
PACKED_OUTLIERS = ("resq_w4a4", "resq_w4a4kv4")  # whose product is a call of its own
ROUNDED_CACHES = ("frtq_w4a4kv4", "quad_w4a4_kv4")  # which the native step of a whole decoder does not read
SERVED_RECIPES = ("quad_w4a4",)  # by a vLLM server in the tests; of the others, vLLM runs the formats of their linears

MODELS = {
    "apertus": "Apertus",
    "arcee": "AFM-4.5B",
    "cwm": "Code World Model",
    "ernie4_5": "ERNIE 4.5, dense",
    "glm": "GLM-4-9B-Chat, GLM-Edge",
    "granite": "Granite 3, dense",
    "granite_swa": "Granite with sliding windows",
    "hunyuan_v1_dense": "Hunyuan, dense",
    "llama": "Llama 1 to 3.3, SmolLM2, and what shares their class",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3, text only",
    "mistral": "Mistral 7B, Nemo, Small",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3, dense",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
}

# One of each reason in quad_modifiers.model.refusal that is about a family.
REFUSED = {
    "Gemma 2 and 3, OLMo 2 and 3, EXAONE 4, GLM-4-0414": "olmo2",
    "Gemma": "gemma",
    "Phi-1 and 2, StarCoder 2, GPT-NeoX, StableLM, Command R": "phi",
    "Mixtral, Qwen3-MoE, gpt-oss, OLMoE, Granite MoE": "mixtral",
    "DeepSeek and other MLA models without experts, such as MiniCPM3": "minicpm3",
    "Mamba, Jamba, RWKV, LFM2, Qwen3-Next, Granite 4": "mamba",
    "Gemma 3 with images, Llama 4, Qwen-VL, Phi-4-multimodal": "llava",
    "T5, BART, Whisper": "t5",
}


class Support(NamedTuple):
    """A model type and what runs with it.

    Attributes:
        architecture: names of its parts.
        recipes: recipes of this package that it can be compressed with.
        native: whether the native CPU kernels run its blocks, and a token through all of them, in one call.
        vllm: name of the class in the vLLM plugin, empty if there is none.
    """

    architecture: Architecture
    recipes: tuple[str, ...]
    native: bool
    vllm: str

    @property
    def model_type(self) -> str:
        """`config.model_type` of the stock model."""
        return self.architecture.model_type


def supported() -> list[Support]:
    """Returns what runs with each built-in model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    found = []
    for architecture in BUILTIN_ARCHITECTURES:
        config = CONFIG_MAPPING[architecture.model_type]
        served = f"Quad{MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__}"
        native = MODEL_MAPPING[config].__name__ in STOCK_DECODERS
        recipes = tuple(name for name in recipe_names() if _takes(name, architecture))
        found.append(Support(architecture, recipes, native, served if served in MODEL_CLASSES else ""))
    return sorted(found, key=lambda row: row.model_type)


def recipe_names() -> list[str]:
    """Returns the recipes of this package."""
    return sorted(path.stem for path in builtin_recipe_folder().glob("*.yaml"))


def _takes(recipe: str, architecture: Architecture) -> bool:
    """False for a recipe that smooths linears which the architecture has fused."""
    fused = any(len(member.produces) > 1 for _, member in architecture.quantized_members())
    text = (builtin_recipe_folder() / f"{recipe}.yaml").read_text(encoding="utf-8")
    return not (fused and "SmoothQuantModifier:" in text)


def model_rows() -> Iterator[tuple[str, ...]]:
    """Yields the table of model types, for `MODEL_HEADER`."""
    every = recipe_names()
    for row in supported():
        missing = [name for name in every if name not in row.recipes]
        yield (
            row.model_type,
            MODELS[row.model_type],
            "all but " + ", ".join(missing) if missing else "all",
            "yes",
            "yes",
            "blocks and decoding" if row.native else "linears",
            "yes" if row.vllm else "no",
            "yes",
        )


MODEL_HEADER = (
    "model_type",
    "such as",
    "recipes",
    "transformers",
    "torch.compile",
    "native CPU kernels",
    "vLLM plugin",
    "quad export",
)


def recipe_rows() -> Iterator[tuple[str, ...]]:
    """Yields the table of recipes, for `RECIPE_HEADER`."""
    for name in recipe_names():
        plain = name in PLAIN_RECIPES
        yield (
            name,
            "compressed-tensors" if plain else "QUAD",
            "yes" if plain else "no",
            "no" if plain else _native_part(name),
            _served_part(name),
        )


def _native_part(recipe: str) -> str:
    if recipe in (*FLOAT_INPUTS, *PACKED_OUTLIERS):
        return "linears"
    return "blocks" if recipe in ROUNDED_CACHES else "blocks and decoding"


def _served_part(recipe: str) -> str:
    if recipe in PLAIN_RECIPES:
        return "no: vLLM's own"
    return "yes" if recipe in SERVED_RECIPES else "its formats"


RECIPE_HEADER = ("recipe", "checkpoint", "loads without this package", "native CPU kernels", "vLLM plugin")


def refused_rows() -> Iterator[tuple[str, ...]]:
    """Yields the families that are refused, each with the reason."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from quad_modifiers.model.refusal import reason_of_refusal

    for family, model_type in REFUSED.items():
        config: Any = CONFIG_MAPPING[model_type]()
        yield family, reason_of_refusal(config)


def page() -> str:
    """Returns docs/reference/support.md."""
    return _PAGE.format(
        models=_markdown(MODEL_HEADER, model_rows()),
        recipes=_markdown(RECIPE_HEADER, recipe_rows()),
        refused=_markdown(("models", "why not"), refused_rows()),
    )


def _markdown(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


_PAGE = """\
<!-- Written by `python -m quad_modifiers.tools.support_table > docs/reference/support.md`; a test compares. -->

# What is supported

`quad support` prints the first table, `quad support MODEL` what it says of a model, from its config alone.

## Model types

A test runs every cell on a toy of the type with random weights, in which every factor, norm and kind of layer of the
type is in use. That says that the mathematics and the files are right. How much quality a recipe keeps is another
question, and [measured on two models](../guide/recipes.md#measured) only.

{models}

- **recipes**: the model is compressed, saved and loaded again, gives the same logits, and generates with a cache what
  it computes without one. All recipes of all types are in the tier `slow`, `quad_w4a4` and `quad_w4a4_portable` in the
  default one.
- **torch.compile**: the forward is captured as one graph and gives the same logits. Code was generated from that graph
  (inductor) for Llama.
- **native CPU kernels**: "linears" means that the native product computes each linear and transformers the rest.
- **vLLM plugin**: a toy with 8-bit weights and inputs gives the log-probabilities of transformers, on the CPU, in the
  tier `vllm`. On CUDA nothing was run. "no" means that the plugin has no class for the type, and vLLM refuses
  the checkpoint: vLLM has none of its own, or (Ministral 3) it gave other numbers than transformers.
- **quad export**: a checkpoint of the type becomes plain compressed-tensors, which stock transformers loads.

Phi-3 with "longrope" needs the square basis where a plain model is wanted (`quad_w4a4_square`, `quad export`): stock
transformers derives the number of its factors from hidden_size, which the extended basis changes.

## Recipes

For a model type whose blocks the kernels know. "its formats" means that linears of these formats were compared in vLLM,
and no checkpoint of the recipe.

{recipes}

## What is refused

Before a weight is read, with the reason. [A plugin can add a type](../developer/architectures.md) whose blocks are of
the known shape under other names; the reasons below are about the shape.

{refused}
"""


if __name__ == "__main__":
    print(page(), end="")
