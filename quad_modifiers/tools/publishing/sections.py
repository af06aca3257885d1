"""The sections of the model card, in Markdown, from the files of the checkpoint."""

from pathlib import Path

from quad_modifiers.checkpoint.format import QuadFormat, read_format
from quad_modifiers.records.evaluation_record import Evaluation
from quad_modifiers.records.inventory import KIND_NAMES, Inventory
from quad_modifiers.records.tuning_record import Tuning, read_tuning
from quad_modifiers.records.widths import group_bits, groups_of_roles, input_bits, weight_bits
from quad_modifiers.tools.publishing.base_license import UNKNOWN, License
from quad_modifiers.tools.publishing.citation import BIBTEX, PAPER_URL
from quad_modifiers.tools.publishing.quality_section import quality_section


def write_sections(
    folder: Path,
    inventory: Inventory,
    repo_id: str,
    base_model: str | None,
    license: License,
    evaluation: Evaluation | None,
) -> dict[str, str]:
    """Returns the sections by name, in the order of a new card."""
    quad = None if inventory.quad is None else read_format(inventory.quad)
    tuning = read_tuning(folder)
    return {
        "summary": _summary(inventory, quad, base_model, license),
        "usage": _usage(quad, repo_id),
        "evaluation": quality_section(evaluation),
        **({} if tuning is None else {"tuning": _tuning(tuning)}),
        "quantization": _quad_widths(quad) if quad else _plain_widths(inventory),
        "size": _size(inventory),
        "recipe": _recipe(folder),
        "citation": f"## Citation\n\n```bibtex\n{BIBTEX}\n```",
    }


def _summary(inventory: Inventory, quad: QuadFormat | None, base_model: str | None, license: License) -> str:
    origin = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a model that was not named"
    architecture = quad.base_model_type if quad else inventory.config.get("model_type")
    method = (
        f"by [QUAD]({PAPER_URL}) with `quad-modifiers`: the directions in which activations are large stay in full "
        "precision, with their weights; the rest is quantized."
        if quad
        else "with `quad-modifiers`, in the compressed-tensors format."
    )
    lines = [f"{origin[0].upper()}{origin[1:]} ({architecture} architecture), quantized {method}"]
    if license.identifier == UNKNOWN:
        lines.append("The license of the original model was not found; ask its authors before you use this one.")
    return "\n\n".join(lines)


def _usage(quad: QuadFormat | None, repo_id: str) -> str:
    packages = "quad-modifiers" if quad else "compressed-tensors transformers"
    first = "import quad_modifiers  # teaches transformers the format\n" if quad else ""
    note = (
        "The plugin in quad-modifiers loads itself; install it in vLLM's environment."
        if quad
        else "vLLM needs no plugin for this checkpoint; its version and the device decide whether it quantizes inputs."
    )
    install = "pip install quad-modifiers\n" if quad else ""
    return f"""## How to load it

transformers (`pip install {packages}`):

```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

vLLM:

```bash
{install}vllm serve {repo_id}
```

{note}"""


def _tuning(tuning: Tuning) -> str:
    trained = "outlier weights and the scales of the quantized weights" if tuning.weight_scales else "outlier weights"
    goal = "on the next token" if tuning.original is None else f"by distillation from {tuning.original}"
    lines = [
        "## Fine-tuning",
        "",
        f"After quantization the {trained} ({tuning.trainable_parameters:,} parameters) were trained {goal}; the "
        f"quantized integers are unchanged. Text: {tuning.data}, {tuning.samples} samples, {tuning.tokens:,} tokens. "
        f"AdamW, largest learning rate {tuning.learning_rate:g}, {tuning.steps} steps of {tuning.batch_size} samples; "
        f"the weights are those of step {tuning.best_step}.",
        "",
        f"| on {tuning.validation_samples} samples of that text that were not trained on | before | after |",
        "|---|---|---|",
        f"| perplexity | {tuning.before.perplexity:.3f} | {tuning.after.perplexity:.3f} |",
    ]
    if tuning.before.divergence is not None and tuning.after.divergence is not None:
        before, after = tuning.before.divergence, tuning.after.divergence
        lines.append(f"| KL to the original, nats per token | {before:.4f} | {after:.4f} |")
    if tuning.original_perplexity is not None:
        lines += ["", f"The original has perplexity {tuning.original_perplexity:.3f} on them."]
    return "\n".join(lines)


def _quad_widths(quad: QuadFormat) -> str:
    lines = [
        "## What is quantized",
        "",
        "| linear | weight bits | one scale per | input bits | one scale per | clip ratio | full-precision inputs | "
        "online Hadamard |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = [role for role in groups_of_roles(quad) if role in quad.linears]
    for role in [*order, *(role for role in quad.linears if role not in order)]:
        linear = quad.linears[role]
        weight, inputs = linear.weight, linear.input
        cells = [
            role,
            str(weight_bits(linear)),
            _scope("output channel", weight.group_size) if weight else "",
            str(input_bits(linear)),
            _scope("token", inputs.group_size) if inputs else "",
            f"{inputs.clip_ratio:g}" if inputs else "",
            f"{linear.outliers_per_block * (linear.in_features // linear.block)} of {linear.in_features}",
            "yes" if linear.hadamard else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    basis = quad.residual_basis
    if basis is not None:
        stream = basis.hidden_size + (basis.rank if basis.basis == "extended" else 0)
        lines += [
            "",
            f"The residual stream is written in the {basis.basis} basis: rank {basis.rank}, hidden size "
            f"{basis.hidden_size} in the original and {stream} here, rotation {basis.rotation}, seed {basis.seed}.",
        ]
    ends = {"Embedding": quad.embedding, "Head": quad.head}
    stored = [f"{name}: {'not quantized' if end is None else f'{end.bits} bits'}." for name, end in ends.items()]
    lines += ["", f"Inputs are quantized at run time. {' '.join(stored)}"]
    return "\n".join(lines)


def _plain_widths(inventory: Inventory) -> str:
    lines = ["## What is quantized", "", "| linears | weight bits | input bits |", "|---|---|---|"]
    groups = inventory.config["quantization_config"].get("config_groups") or {}
    for (weight, inputs), group in zip(group_bits(inventory), groups.values(), strict=True):
        targets = ", ".join(f"`{target}`" for target in group.get("targets", []))
        lines.append(f"| {targets} | {weight} | {inputs} |")
    return "\n".join(lines)


def _size(inventory: Inventory) -> str:
    lines = ["## Size", "", "| tensors | MB | share |", "|---|---|---|"]
    for kind, name in KIND_NAMES.items():
        if kind in inventory.bytes_of:
            size = inventory.bytes_of[kind]
            lines.append(f"| {name} | {size / 1e6:.1f} | {100 * size / inventory.total:.1f} % |")
    lines.append(f"| **all** | **{inventory.total / 1e6:.1f}** | |")
    return "\n".join([*lines, "", f"What is not quantized is {inventory.dtype}."] if inventory.dtype else lines)


def _recipe(folder: Path) -> str:
    file = folder / "recipe.yaml"
    if not file.is_file():
        return "## Recipe\n\nNot recorded."
    return f"## Recipe\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"


def _scope(whole: str, group_size: int | None) -> str:
    return whole if group_size is None else f"{whole} and {group_size} coordinates"
