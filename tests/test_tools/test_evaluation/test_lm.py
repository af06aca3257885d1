"""lm-eval's model type `quad`: that it loads what it should, and scores as the model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.evaluation.lm import QuadLM
from quad_modifiers.tools.evaluation.subject import Subject

REQUESTS = [
    ("Seven wizards mixed", " a jug"),
    ("Seven wizards mixed", " a jug of potent black liquid"),
    ("The engineer measured the bridge twice and", " went home."),
    ("In 1867", " nothing was quantized"),
    ("weight @ basis", " in float64, cast back once"),
]


def likelihoods(lm: QuadLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(REQUESTS)]
    return [likelihood for likelihood, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def by_hand(model: Any, tokenizer: Any) -> list[float]:
    found = []
    for context, continuation in REQUESTS:
        given = len(tokenizer(context).input_ids)
        ids = torch.tensor([tokenizer(context + continuation).input_ids])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(1, ids[0, 1:, None])[given - 1 :].sum().item())
    return found


def test_a_quad_checkpoint_is_loaded_as_one(quad_checkpoint: Path) -> None:
    lm = QuadLM(str(quad_checkpoint))
    containers = [module for module in lm.model.modules() if isinstance(module, QuadLinear)]
    assert len(containers) == 14
    assert all(container.quantize_input for container in containers)
    assert likelihoods(lm) == pytest.approx(by_hand(lm.model, lm.tokenizer), rel=1e-4)


def test_batches_do_not_change_the_scores(quad_checkpoint: Path, toy_checkpoint: Any) -> None:
    for folder in (quad_checkpoint, toy_checkpoint("qwen2")):
        one, many = (likelihoods(QuadLM(str(folder), batch_size=size)) for size in (1, 5))
        assert many == pytest.approx(one, rel=1e-5)


def test_log_likelihoods_of_a_bf16_model_are_float32(make_toy: Any, toy_tokenizer: Any) -> None:
    model = make_toy("llama", dtype=torch.bfloat16)
    found = likelihoods(QuadLM(model, tokenizer=toy_tokenizer))
    assert found == pytest.approx(by_hand(model, toy_tokenizer), rel=1e-3)
    rounded = likelihoods(QuadLM(model, tokenizer=toy_tokenizer, softmax_dtype=None))
    assert max(abs(a - b) for a, b in zip(found, rounded, strict=True)) > 0.01


def test_a_model_without_its_head_is_refused(make_toy: Any, toy_tokenizer: Any, tmp_path: Path) -> None:
    make_toy("llama").model.save_pretrained(tmp_path)
    toy_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no whole LlamaForCausalLM: lm_head\.weight is missing"):
        QuadLM(str(tmp_path))
    with pytest.raises(ValueError, match=r"no whole LlamaForCausalLM: lm_head\.weight is missing"):
        _ = Subject(tmp_path).lm


def test_options_of_a_loaded_model_have_no_effect(make_toy: Any) -> None:
    with pytest.raises(ValueError, match="dtype=float16 has no effect on a model that is loaded already"):
        Subject(make_toy("llama"), options=LoadingOptions(dtype="float16"))


def test_a_subject_in_another_dtype(toy_checkpoint: Any) -> None:
    subject = Subject(toy_checkpoint("llama"), device="cpu", options=LoadingOptions(dtype="bfloat16"))
    assert subject.lm.model.dtype == torch.bfloat16


def bare(tokenizer: Any) -> Any:
    """The same tokenizer without any special token."""
    return PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer._tokenizer))


def test_a_tokenizer_without_special_tokens_takes_those_of_the_model(make_toy: Any, toy_tokenizer: Any) -> None:
    tokenizer = bare(toy_tokenizer)
    lm = QuadLM(make_toy(), tokenizer=tokenizer)
    assert (lm.prefix_token_id, lm.eot_token_id) == (0, 1)
    assert lm.tokenizer.pad_token_id < 320
    assert tokenizer.pad_token is None  # that of the caller
    assert len(likelihoods(lm)) == len(REQUESTS)


def test_no_special_tokens_anywhere_name_the_remedy(make_toy: Any, toy_tokenizer: Any) -> None:
    model = make_toy(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    lm = QuadLM(model, tokenizer=bare(toy_tokenizer))
    with pytest.raises(ValueError, match=r"nor the model's config has bos_token_id or eos_token_id"):
        _ = lm.prefix_token_id


def test_tokens_that_the_model_does_not_embed(make_toy: Any, toy_tokenizer: Any) -> None:
    lm = QuadLM(make_toy(vocab_size=100), tokenizer=toy_tokenizer)
    with pytest.raises(ValueError, match=r"a request has the token id .* embeds the ids 0 to 99"):
        likelihoods(lm)


def test_logits_that_are_not_finite(make_toy: Any, toy_tokenizer: Any) -> None:
    model = make_toy()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        likelihoods(QuadLM(model, tokenizer=toy_tokenizer))
