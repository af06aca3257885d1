"""The settings of the paper (QUAD, arXiv 2503.19353) and of its code, and ResQ's, on a model of your choice.

    python -m quad_modifiers.bench.published meta-llama/Meta-Llama-3-8B -o outputs/published --damping 0.05
    python -m quad_modifiers.bench.published Qwen/Qwen2.5-7B -o outputs/published-qwen

Compresses with each setting, evaluates beside the original, and prints one table. Each checkpoint and each measured
part is kept, so the same command resumes after an interruption. It needs the Hub, and for these models a GPU; with
--calibration, --instructions, --perplexity and --tasks it runs on local text.

What cannot be as published: the outlier columns take part in GPTQ, as everywhere in this package; projection and GPTQ
see the same calibration windows (the paper takes 32 of 512 tokens for the projection); the embedding is not centred,
which the published code does and which is wrong for RMSNorm. The clip ratio 0.9 is written on compressed-tensors' grid,
whose scale is max / ((2^b - 1) / 2) where the paper's is max / (2^(b-1) - 1). ResQ (arXiv 2412.14363) is resq_w4a4 and
resq_w4a4kv4, whose headers say what differs; it takes 512 windows of WikiText-2 for the projection and 128 for GPTQ.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quad_modifiers.data import local_texts
from quad_modifiers.output_folder import replace_file
from quad_modifiers.recipe.overrides import overridden
from quad_modifiers.records.evaluation_record import EVALUATION_NAME, Evaluation, write_evaluation
from quad_modifiers.tools.console import log_on_stderr
from quad_modifiers.tools.publishing.markdown import markdown_table

RANK, CLIP_RATIO = 64, 0.9
SAMPLES, LENGTH = 128, 2048
TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")
_MADE_WITH = ("model", "damping", "calibration", "instructions", "samples", "length")
_C4 = "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz"


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    rank: int  # outlier dimensions; 0 is QuaRot
    d_type_bits: int  # bits of the inputs of o_proj and down_proj

    def recipe(self, damping: float) -> str:
        """Returns the text of the recipe."""
        clip = {bits: CLIP_RATIO * (2**bits - 1) / (2**bits - 2) for bits in (4, 8)}
        return f"""
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {{rank: {self.rank}, online_rotation: [o_proj, down_proj]}}
    DynamicActQuant:
      u_type_bits: 4
      d_type_bits: {self.d_type_bits}
      u_type_clip_ratio: {clip[4]:.6f}
      d_type_clip_ratio: {clip[self.d_type_bits]:.6f}
    OutlierSplitGPTQ: {{bits: 4, activation_order: false, damping: {damping}, sweeps: 0, error_correction: 0.0}}
"""


@dataclass(frozen=True)
class RecipeSetting:
    """A line whose settings are those of a recipe of this package."""

    name: str  # name of the recipe

    def recipe(self, damping: float) -> str:
        """Returns the text of the recipe."""
        return overridden(self.name, [f"OutlierSplitGPTQ.damping={damping}"])


RESQ = ("resq_w4a4", "resq_w4a4kv4")
SETTINGS: dict[str, Setting | RecipeSetting] = {
    "quarot_w4a4": Setting(0, 4),
    "quad_w4a4": Setting(RANK, 4),
    "quad_w4a4a8": Setting(RANK, 8),
} | {name: RecipeSetting(name) for name in RESQ}


@dataclass(frozen=True)
class TuningSetting:
    """How the paper trains on instructions."""

    length: int = 1024  # tokens of a sample, at most
    batch_size: int = 4  # samples in a forward pass
    accumulation: int = 32  # forward passes in a step
    learning_rate: float = 1e-5  # largest learning rate
    warmup_steps: int = 50  # steps until the largest learning rate


TUNING = TuningSetting()
# The setting whose outlier weights are then trained on instructions; it is compressed once.
TUNED = {"quad_w4a4a8_tuned": "quad_w4a4a8"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the settings in turn and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m quad_modifiers.bench.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or Hub id of the original")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, *TUNED], default=[*SETTINGS, *TUNED])
    parser.add_argument(
        "--damping", type=float, default=0.01, help="published: 0.01 for Qwen2.5 and ResQ, 0.05 for Llama-3"
    )
    parser.add_argument("--calibration", help="text file or `datasets` name; default: a part of C4")
    parser.add_argument("--instructions", help="text file to tune on; default: alpaca-cleaned")
    parser.add_argument("--perplexity", type=Path, help="text file; default: the test split of WikiText-2")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="of lm-eval; quad_offline needs no network")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of calibration and perplexity windows")
    parser.add_argument("--limit", type=int, help="items of each task and windows of the text, for a trial")
    options = parser.parse_args(arguments)
    _check_same_run(options)
    found = {}
    with log_on_stderr():
        for name in options.settings:
            checkpoint = _checkpoint(name, options)
            found[name] = _evaluate(checkpoint, options)
            write_evaluation(found[name], checkpoint / EVALUATION_NAME)
    print(render(found))
    return 0


def _check_same_run(options: argparse.Namespace) -> None:
    """Records what the checkpoints of a folder are made with; refuses to continue with others."""
    made_with = {name: getattr(options, name) for name in _MADE_WITH}
    file = options.output / "options.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [name for name in _MADE_WITH if found[name] != made_with[name]]
        if differing:
            raise ValueError(
                f"the checkpoints in {options.output} were made with another {', another '.join(differing)}; give the "
                "same, or another --output"
            )
    replace_file(file, json.dumps(made_with, indent=1) + "\n")


def render(found: dict[str, Evaluation]) -> str:
    """Returns a Markdown table: perplexity, its ratio, and the mean accuracy against the original's."""
    rows = []
    for name, evaluation in found.items():
        (text,) = evaluation.perplexity
        assert text.baseline is not None
        cells = [name, f"{text.value:.3f}", f"{text.baseline:.3f}", f"{text.value / text.baseline:.4f}"]
        mean = evaluation.average or next(iter(evaluation.comparisons), None)
        accuracy = ["", "", ""]
        if mean is not None and mean.baseline is not None and mean.percent is not None:
            accuracy = [f"{mean.value:.4f}", f"{mean.baseline:.4f}", f"{mean.percent:.1f} %"]
        rows.append(cells + accuracy)
    table = markdown_table(("setting", "perplexity", "original", "ratio", "accuracy", "original", "kept"), rows)
    return f"{table}\n\nThe paper's abstract: 94 to 96 % of full precision with W4A4, 98 % with W4A4/A8 and tuning."


def _checkpoint(name: str, options: argparse.Namespace) -> Path:
    """Returns the folder of a setting's checkpoint, made unless it is there."""
    folder = Path(options.output, name)
    if not folder.is_dir():
        make = _tune if name in TUNED else _compress
        make(name, folder, options)
    return folder


def _compress(name: str, folder: Path, options: argparse.Namespace) -> None:
    from datasets import load_dataset

    from quad_modifiers import oneshot

    oneshot(
        options.model,
        SETTINGS[name].recipe(options.damping),
        dataset=options.calibration or load_dataset("json", data_files=_C4, split="train"),
        num_calibration_samples=options.samples,
        max_seq_length=options.length,
        output_dir=folder,
    )


def _tune(name: str, folder: Path, options: argparse.Namespace) -> None:
    from quad_peft.training import TuningSettings, finetune, merge

    untuned, adapter = _checkpoint(TUNED[name], options), Path(options.output, f"{name}.adapter")
    if not adapter.is_dir():
        texts = local_texts(options.instructions) if options.instructions else _instructions()
        steps = math.ceil(len(texts) / (TUNING.batch_size * TUNING.accumulation))
        settings = TuningSettings(
            batch_size=TUNING.batch_size,
            accumulation=TUNING.accumulation,
            learning_rate=TUNING.learning_rate,
            warmup=min(0.5, TUNING.warmup_steps / steps),
        )
        finetune(untuned, adapter, data=texts, settings=settings, length=TUNING.length, packed=False, resume=True)
    merge(untuned, adapter, folder)


def _evaluate(checkpoint: Path, options: argparse.Namespace) -> Evaluation:
    from quad_modifiers.tools.evaluation import evaluate

    return evaluate(
        checkpoint,
        options.tasks,
        baseline=options.model,
        text=options.perplexity or _wikitext(options.output),
        window_length=options.length,
        limit=options.limit,
    )


def _wikitext(folder: Path) -> Path:
    file = folder / "wikitext-2-test.txt"
    if not file.is_file():
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        replace_file(file, "\n\n".join(rows["text"]))
    return file


def _instructions() -> list[str]:
    """Returns the instructions of alpaca-cleaned with their answers."""
    from datasets import load_dataset

    rows = load_dataset("yahma/alpaca-cleaned", split="train")
    return [
        "\n\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part.strip()) for row in rows
    ]


if __name__ == "__main__":
    raise SystemExit(main())
