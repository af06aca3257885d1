"""Toys, recipes and checkpoints. This distribution must be installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quad_modifiers import oneshot

PROJECT = "SVDOutlierProjection: {rank: 8}"
BRANCH = "LowRankResidue: {rank: 8}"
QUANTIZE = ("DynamicActQuant: {}", "OutlierSplitGPTQ: {}")
TOKENS = torch.randint(3, 256, (32, 32), generator=torch.Generator().manual_seed(1))

Compress = Callable[..., "Compressed"]


@dataclass
class Compressed:
    """A toy before and after a recipe.

    Attributes:
        folder: its checkpoint.
        model: in memory, as the recipe left it.
        original: logits of the toy.
        logits: logits of `model`.
    """

    folder: Path
    model: PreTrainedModel
    original: torch.Tensor
    logits: torch.Tensor

    @property
    def error(self) -> float:
        """Relative error of the logits."""
        return float((self.logits - self.original).norm() / self.original.norm())

    @property
    def quad(self) -> dict:
        """The `quad` section of its config.json."""
        return json.loads((self.folder / "config.json").read_text())["quantization_config"]["quad"]


@torch.no_grad()
def toy(model_type: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a model with random weights in which nothing is zero, one or centred."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.ndim == 1 or "embed" in name else parameter.shape[1] ** -0.5
        parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.1 if "embed" in name else 0.0))
    return model


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 256 tokens, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS[:2]).logits


@pytest.fixture(scope="session")
def compress(tmp_path_factory: pytest.TempPathFactory) -> Compress:
    """Returns `compress(*lines, model_type="llama", dtype=float32, name="")`: the toy after the modifiers of the lines.

    A checkpoint with a name lies under it in the base folder of the run.
    """

    def made(*lines: str, model_type: str = "llama", dtype: torch.dtype = torch.float32, name: str = "") -> Compressed:
        model, base = toy(model_type, dtype), tmp_path_factory.getbasetemp()
        folder = base / name if name else tmp_path_factory.mktemp("made") / "checkpoint"
        original = logits_of(model)
        recipe = "a_stage:\n  a_modifiers:\n" + "".join(f"    {line}\n" for line in lines)
        model = oneshot(model, recipe, dataset=TOKENS, num_calibration_samples=32, max_seq_length=32, output_dir=folder)
        return Compressed(folder, model, original, logits_of(model))

    return made


@pytest.fixture(scope="session")
def branched(compress: Compress) -> Compressed:
    """A llama toy with low-rank branches beside 4-bit weights and inputs; never write to its folder."""
    return compress(PROJECT, BRANCH, *QUANTIZE, name="branched")
