import math

import pytest
import torch

from quad_modifiers.tools.evaluation import perplexity


@pytest.fixture
def windows():
    return torch.randint(0, 320, (5, 12), generator=torch.Generator().manual_seed(0))


def test_equals_the_models_own_loss(make_toy, windows, tolerance):
    model = make_toy("llama")
    with torch.no_grad():
        losses = torch.stack([model(input_ids=window[None], labels=window[None]).loss for window in windows])
    measured = perplexity(model, windows, progress=False)
    bound = tolerance(torch.float32)
    torch.testing.assert_close(measured.nll_per_token, losses.mean().item(), **bound)
    torch.testing.assert_close(measured.stderr, losses.std().item() / math.sqrt(5), **bound)
    assert measured.value == math.exp(measured.nll_per_token)
    assert measured.tokens == 5 * 11
    assert "+-" in str(measured)


def test_batch_size_and_form_do_not_matter(make_toy, windows, tolerance):
    model = make_toy("qwen2")
    one = perplexity(model, windows, progress=False)
    two = perplexity(model, list(windows.split(1)), batch_size=2, progress=False)
    torch.testing.assert_close(two.nll_per_token, one.nll_per_token, **tolerance(torch.float32))
    torch.testing.assert_close(two.stderr, one.stderr, **tolerance(torch.float32))


def test_uniform_model_has_the_vocabulary_size(make_toy, windows):
    model = make_toy("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, windows, progress=False).value == pytest.approx(320, rel=1e-5)


def test_mode_is_restored_and_one_window_has_no_error(make_toy, windows):
    model = make_toy("llama").train()
    measured = perplexity(model, windows[:1], progress=False)
    assert model.training
    assert math.isnan(measured.stderr)
    assert "+-" not in str(measured)


def test_nan_names_the_window(make_toy, windows):
    model = make_toy("llama")
    model.model.embed_tokens.weight.data[windows[3, 4]] = math.nan
    clean = [index for index in range(5) if windows[3, 4] not in windows[index]]
    with pytest.raises(ValueError, match=r"NaN or infinite in window \d"):
        perplexity(model, windows, batch_size=2, progress=False)
    assert math.isfinite(perplexity(model, windows[clean], progress=False).value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 4, dtype=torch.long), "at least one window"),
        (torch.zeros(2, 1, dtype=torch.long), "of two tokens"),
        (torch.zeros(4, dtype=torch.long), r"not \[4\]"),
        ([], "non-empty sequence"),
        ([torch.zeros(1, 4), torch.zeros(1, 5)], r"\(1, 4\), \(1, 5\)"),
        (torch.full((1, 4), 320), "from 320 to 320, but the model embeds 0 to 319"),
    ],
)
def test_bad_windows(make_toy, bad, message):
    with pytest.raises(ValueError, match=message):
        perplexity(make_toy("llama"), bad, progress=False)


def test_bad_batch_size(make_toy, windows):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        perplexity(make_toy("llama"), windows, batch_size=0)


@pytest.mark.slow
def test_smollm2_on_held_out_wikipedia(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quad_modifiers.data import token_windows, wikipedia_articles

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows = token_windows(tokenizer, wikipedia_articles("held_out"), 512, 8, seed=0)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)  # bfloat16 is slow on many CPUs
    measured = perplexity(model, windows, progress=False)
    print(measured)
    assert 13 < measured.value < 19
    assert tokenizer.eos_token == "<|im_end|>"
