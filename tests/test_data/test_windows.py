import pytest
import torch

from quad_modifiers.data import token_windows

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "", "Seven wizards mix a jug of liquid. " * 20]


def test_windows_are_consecutive_pieces_of_the_joined_text(toy_tokenizer):
    joined = TEXTS[0] + "\n\n" + TEXTS[2]
    expected = toy_tokenizer(joined, add_special_tokens=False)["input_ids"]
    windows = token_windows(toy_tokenizer, TEXTS, 16)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(expected) // 16, 16)
    assert windows.flatten().tolist() == expected[: windows.numel()]
    assert toy_tokenizer.decode(windows[0]) == joined[: len(toy_tokenizer.decode(windows[0]))]


def test_without_seed_the_first_windows(toy_tokenizer):
    assert torch.equal(token_windows(toy_tokenizer, TEXTS, 16, 3), token_windows(toy_tokenizer, TEXTS, 16)[:3])


def test_seed_draws_without_replacement_and_repeats(toy_tokenizer):
    every = token_windows(toy_tokenizer, ["".join(map(chr, range(33, 126))) * 3], 16)
    drawn = token_windows(toy_tokenizer, ["".join(map(chr, range(33, 126))) * 3], 16, len(every), seed=1)
    assert sorted(drawn.tolist()) == sorted(every.tolist())
    assert torch.equal(
        drawn, token_windows(toy_tokenizer, ["".join(map(chr, range(33, 126))) * 3], 16, len(every), seed=1)
    )
    assert not torch.equal(drawn, every)


def test_too_few_windows_says_how_many_tokens_and_what_to_lower(toy_tokenizer):
    tokens = len(toy_tokenizer("abc " * 50, add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=rf"{tokens} tokens, enough for {tokens // 32} windows of 32.* 100 are needed"):
        token_windows(toy_tokenizer, ["abc " * 50], 32, 100)
    with pytest.raises(ValueError, match="less than one window of 32"):
        token_windows(toy_tokenizer, ["abc"], 32)


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(toy_tokenizer, texts):
    with pytest.raises(ValueError, match="no text to tokenize"):
        token_windows(toy_tokenizer, texts, 16)


def test_one_string_or_no_string_is_refused(toy_tokenizer):
    with pytest.raises(TypeError, match="wrap it in a list"):
        token_windows(toy_tokenizer, "some text", 4)
    with pytest.raises(TypeError, match="text 1 is a NoneType"):
        token_windows(toy_tokenizer, ["some text", None], 4)


@pytest.mark.parametrize(("length", "count"), [(0, None), (4, 0)])
def test_sizes_must_be_positive(toy_tokenizer, length, count):
    with pytest.raises(ValueError, match="must be positive"):
        token_windows(toy_tokenizer, TEXTS, length, count)


def test_fewer_where_there_are_fewer(toy_tokenizer):
    every = token_windows(toy_tokenizer, TEXTS, 4)
    assert len(token_windows(toy_tokenizer, TEXTS, 4, 10_000, seed=0, fewer=True)) == len(every)
    assert torch.equal(
        token_windows(toy_tokenizer, TEXTS, 4, 2, seed=0, fewer=True), token_windows(toy_tokenizer, TEXTS, 4, 2, seed=0)
    )
