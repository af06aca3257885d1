"""The fused losses against plain ones that hold all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quad_modifiers.nn.packed_table import PackedHead
from quad_peft.training.losses import IGNORED, distillation_loss, head_input, next_token_loss, shifted

VOCABULARY, BATCH, TOKENS = 50, 3, 7


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_head(width: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, VOCABULARY, bias=False).requires_grad_(False)
    head.weight.copy_(drawn(VOCABULARY, width, seed=seed))
    return head


def packed_head(width: int, seed: int) -> PackedHead:
    head = PackedHead(VOCABULARY, width, torch.float32)
    integers = torch.randint(-127, 128, (VOCABULARY, width), generator=torch.Generator().manual_seed(seed))
    head.fill(0, integers.to(torch.int8), torch.full((VOCABULARY, 1), 0.01))
    return head


def plain_distillation(student, student_head, teacher, teacher_head, mask, temperature):
    ours = F.log_softmax(student_head(student[mask]) / temperature, -1)
    theirs = F.log_softmax(teacher_head(teacher[mask]) / temperature, -1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * temperature**2


@pytest.mark.parametrize("make_head", [linear_head, packed_head])
@pytest.mark.parametrize("chunk", [None, 1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_equals_the_plain_loss(make_head, chunk, temperature) -> None:
    student_head, teacher_head = make_head(12, 1), linear_head(8, 2)
    student = drawn(BATCH, TOKENS, 12, seed=3).requires_grad_()
    teacher = drawn(BATCH, TOKENS, 8, seed=4)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask[1, 4:] = False
    wanted = plain_distillation(student, student_head, teacher, teacher_head, mask, temperature)
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    got = distillation_loss(student, student_head, teacher, teacher_head, mask, temperature, chunk)
    (gradient,) = torch.autograd.grad(got * 3, student)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, 3 * wanted_gradient, rtol=1e-4, atol=1e-5)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("make_head", [linear_head, packed_head])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_next_token_equals_cross_entropy(make_head, chunk) -> None:
    head, hidden = make_head(12, 1), drawn(BATCH, TOKENS, 12, seed=3).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(5))
    labels[2, 3:] = IGNORED
    wanted = F.cross_entropy(
        head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    )
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden)
    got = next_token_loss(hidden, head, shifted(labels), chunk)
    (gradient,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_a_model_equal_to_its_teacher_has_no_loss() -> None:
    head, hidden = linear_head(12, 1), drawn(BATCH, TOKENS, 12, seed=3).requires_grad_()
    loss = distillation_loss(hidden, head, hidden.detach(), head)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert float(loss.detach().abs()) < 1e-4
    assert float(gradient.abs().max()) < 1e-5


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    calls = []
    head = linear_head(12, 1)
    head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    hidden = drawn(BATCH, TOKENS, 12, seed=3)
    loss = next_token_loss(hidden, head, torch.zeros(BATCH, TOKENS, dtype=torch.long), chunk=5)
    assert not loss.requires_grad
    assert len(calls) == 5
    assert not any(calls)


def test_bfloat16_loss_is_summed_in_float32() -> None:
    head, teacher_head = linear_head(12, 1).bfloat16(), linear_head(8, 2).bfloat16()
    student, teacher = drawn(1, 400, 12, seed=3).bfloat16(), drawn(1, 400, 8, seed=4).bfloat16()
    ours, theirs = (F.log_softmax(h(x).float(), -1) for h, x in ((head, student), (teacher_head, teacher)))
    wanted = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    leaf = student.requires_grad_()
    loss = distillation_loss(leaf, head, teacher, teacher_head, chunk=16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, leaf)[0].dtype == torch.bfloat16


def test_logits_of_a_chunk_are_all_that_exists() -> None:
    """The largest tensor that a step makes is a chunk of logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            result = function(*arguments, **(keywords or {}))
            for each in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return result

    head, teacher_head = linear_head(12, 1), linear_head(8, 2)
    student, teacher = drawn(1, 200, 12).requires_grad_(), drawn(1, 200, 8)
    with Watch():
        distillation_loss(student, head, teacher, teacher_head, chunk=10).backward()
    assert largest < 200 * VOCABULARY
    assert largest >= 10 * VOCABULARY


def test_head_input_is_what_the_head_would_see(make_toy) -> None:
    def broken(**inputs: object) -> None:
        raise RuntimeError("inside")

    model = make_toy()
    head = model.get_output_embeddings()
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(head(head_input(model, head, {"input_ids": ids})), logits)
        assert torch.equal(model(ids).logits, logits)
        with pytest.raises(RuntimeError, match="inside"):
            head_input(broken, head, {"input_ids": ids})
        assert torch.equal(model(ids).logits, logits)


def test_shifted_ends_with_nothing() -> None:
    assert shifted(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]
