"""The cache of the original model's last hidden states."""

from __future__ import annotations

import pytest
import torch

from quad_peft.training.data import Collator
from quad_peft.training.teacher import SAMPLES_PER_FILE, LiveTeacher, cache_teacher


def samples(count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (12 + i,), generator=generator) for i in range(count)]


def batch_of(*rows: tuple[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    return Collator(2)([{"input_ids": ids, "place": place} for place, ids in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_cached_logits_are_those_of_the_model(dtype, tied, make_toy, tmp_path) -> None:
    model, texts = make_toy(dtype=dtype, tie_word_embeddings=tied), samples()
    cached = cache_teacher(model, texts, tmp_path)
    wanted = model(texts[3][None]).logits
    model.get_output_embeddings().weight.data.zero_()  # the teacher keeps a head of its own
    states = cached.hidden_states(batch_of((3, texts[3])))
    assert states.dtype == dtype
    assert torch.equal(cached.head(states), wanted)


def test_cached_equals_live(make_toy, tmp_path) -> None:
    model, texts = make_toy(), samples()
    batch = batch_of((4, texts[4]), (0, texts[0]))
    keep = batch["attention_mask"].bool()
    cached = cache_teacher(model, texts, tmp_path).hidden_states(batch)[keep]
    torch.testing.assert_close(cached, LiveTeacher(model).hidden_states(batch)[keep])


def test_an_interrupted_cache_continues(make_toy, tmp_path) -> None:
    model, texts = make_toy(), samples(2 * SAMPLES_PER_FILE + 3)
    run = []

    def interrupt(*_: object) -> None:
        run.append(1)
        if len(run) == len(texts):  # in the middle of the third file
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(model, texts, tmp_path)
    run.clear()
    cached = cache_teacher(model, texts, tmp_path)
    hook.remove()
    assert len(run) == 3, "the files that are complete are not made again"
    assert sorted(file.name for file in cached.folder.iterdir()) == [f"states-{i:05d}.safetensors" for i in range(3)]
    for place in (4, len(texts) - 1):
        states = cached.hidden_states(batch_of((place, texts[place])))
        assert torch.equal(cached.head(states), model(texts[place][None]).logits)


def test_other_weights_or_texts_are_another_cache(make_toy, tmp_path) -> None:
    texts = samples()
    folders = {
        cache_teacher(make_toy(), texts, tmp_path).folder,
        cache_teacher(make_toy(seed=1), texts, tmp_path).folder,
        cache_teacher(make_toy(), texts[:-1], tmp_path).folder,
    }
    assert len(folders) == 3
    assert cache_teacher(make_toy(), texts, tmp_path).folder in folders
