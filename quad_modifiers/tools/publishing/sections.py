"""The sections of the model card, in Markdown, from the files of the checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from quad_modifiers.checkpoint.format import InputFormat, LinearFormat, QuadFormat, WeightFormat, read_format
from quad_modifiers.checkpoint.transforms import transforms_of
from quad_modifiers.records.calibration_record import CalibrationRecord, read_calibration
from quad_modifiers.records.evaluation_record import Evaluation, task_scores
from quad_modifiers.records.export_record import Export, read_export
from quad_modifiers.records.inventory import KIND_NAMES, Inventory
from quad_modifiers.records.score_cells import percent, perplexity_cells, score_cells, with_error
from quad_modifiers.records.tuning_record import Tuning, read_tuning
from quad_modifiers.records.widths import group_bits, groups_of_roles, input_bits, layer_ranges, weight_bits
from quad_modifiers.tools.publishing.base_license import UNKNOWN, License
from quad_modifiers.tools.publishing.markdown import markdown_table

PAPER_URL = "https://arxiv.org/abs/2503.19353"
BIBTEX = """@article{hu2025quad,
  title   = {QUAD: Quantization and Parameter-Efficient Tuning of LLM with Activation Decomposition},
  author  = {Hu, Yuxuan and Chen, Xiaodong and Li, Cuiping and Chen, Hong and Zhang, Jing},
  journal = {arXiv preprint arXiv:2503.19353},
  year    = {2025}
}"""

_NOT_A_SHARE = ("perplexity", "bits_per_byte", "loss")  # metrics of which a share means nothing


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
    tuning, calibration, exported = read_tuning(folder), read_calibration(folder), read_export(folder)
    needs_vllm = transforms_of(inventory.config) is not None
    return {
        "summary": _summary(inventory, quad, base_model, license),
        "usage": _usage_of_transforms(repo_id) if needs_vllm else _usage(inventory, repo_id),
        **({} if exported is None else {"export": _export(exported)}),
        "evaluation": _quality(evaluation),
        **({} if tuning is None else {"tuning": _tuning(tuning)}),
        **({} if inventory.is_plain else {"quantization": _quad_widths(quad) if quad else _plain_widths(inventory)}),
        "size": _size(inventory),
        **({} if calibration is None else {"calibration": _calibration(calibration)}),
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
        else "with `quad-modifiers` and written with its weights in floating point again."
        if inventory.is_plain
        else "with `quad-modifiers`, in the compressed-tensors format."
    )
    lines = [f"{origin[0].upper()}{origin[1:]} ({architecture} architecture), quantized {method}"]
    if license.identifier == UNKNOWN:
        lines.append("The license of the original model was not found; ask its authors before you use this one.")
    return "\n\n".join(lines)


def _usage(inventory: Inventory, repo_id: str) -> str:
    if inventory.is_plain:
        packages, note = "transformers", "This is an ordinary checkpoint: it takes the memory of the original model."
    elif inventory.quad is None:
        packages = "compressed-tensors transformers"
        note = (
            "vLLM needs no plugin for this checkpoint; its version and the device decide whether it quantizes inputs."
        )
    else:
        packages = "quad-modifiers"
        note = "The plugin in quad-modifiers loads itself; install it in vLLM's environment."
    quad = inventory.quad is not None
    first = "import quad_modifiers  # teaches transformers the format\n" if quad else ""
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


def _usage_of_transforms(repo_id: str) -> str:
    return f"""## How to serve it

vLLM on one CUDA device, without a plugin:

```bash
vllm serve {repo_id}
```

**Not with transformers**, which ignores the transforms in `transform_config` and computes nonsense without an error,
and not with vLLM on a CPU."""


def _export(exported: Export) -> str:
    lines = [f"- {note[0].upper()}{note[1:]}." for note in exported.notes]
    made = f"Written by `quad export --format {exported.format}` (quad-modifiers {exported.package})"
    return "\n".join(["## Export", "", f"{made} from a checkpoint in the format {exported.source}.", "", *lines])


def _quality(evaluation: Evaluation | None) -> str:
    """Returns the section; it says so if nothing was measured."""
    if evaluation is None:
        return "## Evaluation\n\nNo measured results came with this checkpoint."
    original = evaluation.baseline or "original"
    parts = ["## Evaluation"]
    if evaluation.perplexity:
        header = ("perplexity on", "window", "tokens", "this", original, "ratio, 95 % interval", "")
        parts.append(markdown_table(header, map(perplexity_cells, evaluation.perplexity)))
    if evaluation.comparisons:
        columns = ("task (lm-eval)", "metric", "items", "guessing", "this", original, "kept", "above guessing")
        parts.append(markdown_table((*columns, "difference, 95 % interval", ""), _compared(evaluation)))
    elif reported := list(_reported(evaluation)):
        parts.append(markdown_table(("task (lm-eval)", "metric", "this", original, "kept"), reported))
    if evaluation.limit is not None:
        parts.append(f"Of each task only the first {evaluation.limit} items were asked.")
    measured_with = ", ".join(f"{name} {version}" for name, version in evaluation.packages.items())
    context = "; ".join(part for part in (measured_with, evaluation.machine) if part)
    return "\n\n".join([*parts, f"Measured with {context}."] if context else parts)


def _compared(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """Yields one row a task, by its main metric."""
    for each in evaluation.comparisons:
        yield (_task(each.task, evaluation.n_shot.get(each.task)), *score_cells(each))
    if evaluation.average is not None:
        yield ("**average**", *score_cells(evaluation.average))


def _reported(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """Yields every metric of lm-eval's results, for files without a comparison."""
    for score in task_scores(evaluation):
        is_share = score.baseline and not any(part in score.metric for part in _NOT_A_SHARE)
        kept = percent(100 * score.value / score.baseline) if is_share and score.baseline else ""
        value, baseline = with_error(score.value, score.stderr), with_error(score.baseline, None)
        yield (_task(score.task, score.shots), score.metric, value, baseline, kept)


def _task(name: str, shots: int | None) -> str:
    return name if shots is None else f"{name}, {shots}-shot"


def _tuning(tuning: Tuning) -> str:
    parts_of_weights = {"scales": tuning.weight_scales, "integers": tuning.weights}
    of_weights = [name for name, is_trained in parts_of_weights.items() if is_trained]
    trained = "outlier weights"
    if of_weights:
        trained += f" and the {' and '.join(of_weights)} of the quantized weights"
    integers = "the quantized integers are unchanged"
    if tuning.weights:
        integers = f"{tuning.moved_integers:,} quantized integers changed"
    goal = "on the next token" if tuning.original is None else f"by distillation from {tuning.original}"
    before, after = tuning.before, tuning.after
    rows = [("perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")]
    if before.divergence is not None and after.divergence is not None:
        rows.append(("KL to the original, nats per token", f"{before.divergence:.4f}", f"{after.divergence:.4f}"))
    header = (f"on {tuning.validation_samples} samples of that text that were not trained on", "before", "after")
    parts = [
        "## Fine-tuning",
        f"After quantization the {trained} ({tuning.trainable_parameters:,} parameters) were trained {goal}; "
        f"{integers}. Text: {tuning.data}, {tuning.samples} samples, {tuning.tokens:,} tokens. "
        f"AdamW, largest learning rate {tuning.learning_rate:g}, {tuning.steps} steps of {tuning.batch_size} samples; "
        f"the weights are those of step {tuning.best_step}.",
        markdown_table(header, rows),
    ]
    if tuning.original_perplexity is not None:
        parts.append(f"The original has perplexity {tuning.original_perplexity:.3f} on them.")
    return "\n\n".join(parts)


_QUAD_COLUMNS = (
    *("linear", "weight bits", "one scale per", "input bits", "one scale per"),
    *("clip ratio", "full-precision inputs", "online Hadamard"),
)


def _quad_widths(quad: QuadFormat) -> str:
    order = [role for role in groups_of_roles(quad) if role in quad.linears]
    named: list[tuple[str, LinearFormat]] = []
    for role in [*order, *(role for role in quad.linears if role not in order)]:
        named.append((role, quad.linears[role]))
        others = (each for each in quad.overrides if each.role == role)
        named += [(f"{role}, {layer_ranges(each.layers)}", each.replaced(quad.linears[role])) for each in others]
    rows = [_linear_row(name, linear) for name, linear in named]
    if any(linear.outlier is not None for linear in quad.linears.values()):
        header = tuple(name.replace("full-precision", "outlier") for name in _QUAD_COLUMNS)
        rows = [(*row[:6], _outliers(linear), *row[7:]) for row, (_, linear) in zip(rows, named, strict=True)]
        parts = ["## What is quantized", markdown_table(header, rows)]
        parts.append("Outliers in 8 bits have scales of their own: one per output channel, and one per token.")
    else:
        parts = ["## What is quantized", markdown_table(_QUAD_COLUMNS, rows)]
    basis = quad.residual_basis
    if basis is not None:
        stream = basis.hidden_size + (basis.rank if basis.basis == "extended" else 0)
        parts.append(
            f"The residual stream is written in the {basis.basis} basis: rank {basis.rank}, hidden size "
            f"{basis.hidden_size} in the original and {stream} here, rotation {basis.rotation}, seed {basis.seed}."
        )
    ends = {"Embedding": quad.embedding, "Head": quad.head}
    stored = [f"{name}: {'not quantized' if end is None else f'{end.bits} bits'}." for name, end in ends.items()]
    return "\n\n".join([*parts, f"Inputs are quantized at run time. {' '.join(stored)}"])


def _linear_row(name: str, linear: LinearFormat) -> tuple[str, ...]:
    weight, inputs = linear.weight, linear.input
    return (
        name,
        str(weight_bits(linear)),
        _scope("output channel", weight) if weight else "",
        str(input_bits(linear)),
        _scope("token", inputs) if inputs else "",
        f"{inputs.clip_ratio:g}" if inputs else "",
        f"{linear.split().rank} of {linear.in_features}",
        "yes" if linear.hadamard else "no",
    )


def _outliers(linear: LinearFormat) -> str:
    """How many input coordinates are outliers, and what is quantized of them."""
    text = f"{linear.split().rank} of {linear.in_features}"
    if linear.outlier is None:
        return f"{text}, full precision" if linear.outliers_per_block else text
    bits = linear.outlier.input_bits
    inputs = "full precision" if bits is None else f"{bits} bits"
    return f"{text}, weights {linear.outlier.weight_bits} bits, inputs {inputs}"


def _plain_widths(inventory: Inventory) -> str:
    rows = []
    groups = inventory.config["quantization_config"].get("config_groups") or {}
    for (weight, inputs), group in zip(group_bits(inventory), groups.values(), strict=True):
        targets = ", ".join(f"`{target}`" for target in group.get("targets", []))
        rows.append((targets, str(weight), str(inputs)))
    return f"## What is quantized\n\n{markdown_table(('linears', 'weight bits', 'input bits'), rows)}"


def _size(inventory: Inventory) -> str:
    sizes = [(name, inventory.bytes_of[kind]) for kind, name in KIND_NAMES.items() if kind in inventory.bytes_of]
    rows = [(name, f"{size / 1e6:.1f}", f"{100 * size / inventory.total:.1f} %") for name, size in sizes]
    text = f"## Size\n\n{markdown_table(('tensors', 'MB', 'share'), rows)}"
    text += f"\n| **all** | **{inventory.total / 1e6:.1f}** | |"
    return f"{text}\n\nWhat is not quantized is {inventory.dtype}." if inventory.dtype else text


def _calibration(record: CalibrationRecord) -> str:
    rows = [
        (
            each.name,
            each.kind,
            f"{100 * each.share:.0f} %",
            "" if each.texts is None else f"{each.texts:,}",
            f"{each.windows:,}",
            f"{each.tokens:,}",
        )
        for each in record.sources
    ]
    header = ("text", "kind", "share", "texts read", "windows", "tokens")
    parts = ["## Calibration", markdown_table(header, rows)]
    parts.append(f"Windows of up to {record.window_length} tokens, drawn with seed {record.seed}.")
    if any(each.kind == "chat" for each in record.sources):
        parts.append("Conversations were rendered by the tokenizer's chat template.")
    return "\n\n".join(parts)


def _recipe(folder: Path) -> str:
    file = folder / "recipe.yaml"
    if not file.is_file():
        return "## Recipe\n\nNot recorded."
    return f"## Recipe\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"


def _scope(whole: str, grid: WeightFormat | InputFormat) -> str:
    if grid.number_format != "int":
        return f"{grid.group_size} coordinates, {grid.number_format.upper()}"
    if grid.sub_scale_bits is not None:
        return f"{whole}, with a {grid.sub_scale_bits}-bit factor per {grid.group_size} coordinates"
    grouped = whole if grid.group_size is None else f"{whole} and {grid.group_size} coordinates"
    return grouped if grid.symmetric else f"{grouped}, with zero points"
