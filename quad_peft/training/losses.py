"""Losses over a wide vocabulary, fused with the head, so that logits exist for a few positions at a time.

The head is frozen. So all that the backward pass needs is the gradient of the head's input, `[positions, hidden]`, and
the forward pass computes it beside the loss, chunk by chunk: for both losses the gradient of the logits is a difference
of two distributions. Whole logits in float32, of the student and the teacher, would be the largest tensors of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

IGNORED = -100
"""The label of positions that do not count, as everywhere in transformers."""
_CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MiB in float32

ChunkLoss = Callable[[torch.Tensor, slice, bool], tuple[torch.Tensor, torch.Tensor | None]]
"""From the logits of some positions to the sum of their losses and its gradient, if that is wanted."""


def distillation_loss(
    student_hidden: torch.Tensor,
    student_head: nn.Module,
    teacher_hidden: torch.Tensor,
    teacher_head: nn.Module,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Returns the sum over positions of `temperature² KL(teacher || student)`, a float32 scalar.

    Hidden states are `[..., width]`, and the widths of student and teacher may differ; both heads have one vocabulary,
    and the student's receives no gradient. `mask` is `[...]`, bool, False for padding. `chunk` positions are computed
    at a time, by default as many as fit into 64 MiB of float32.
    """
    student, teacher = _rows(student_hidden, mask), _rows(teacher_hidden, mask)

    def loss(logits: torch.Tensor, positions: slice, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        target = F.log_softmax(_logits(teacher_head, teacher[positions]).div_(temperature), dim=-1)
        predicted = F.log_softmax(logits.div_(temperature), dim=-1)
        probability = target.exp()
        divergence = (probability * target.sub_(predicted)).sum() * temperature**2
        return divergence, predicted.exp_().sub_(probability).mul_(temperature) if with_gradient else None

    return _FusedHeadLoss.apply(student, student_head, loss, chunk)


def next_token_loss(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Returns the sum over positions of the cross-entropy, a float32 scalar.

    `hidden` is `[..., width]`; the head receives no gradient. `targets` is `[...]`, the token that follows each
    position (`shifted`), `IGNORED` where none counts; `chunk` is that of `distillation_loss`.
    """
    mask = targets != IGNORED
    rows, wanted = _rows(hidden, mask), targets[mask].unsqueeze(-1)

    def loss(logits: torch.Tensor, positions: slice, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        predicted = F.log_softmax(logits, dim=-1)
        index = wanted[positions]
        total = -predicted.gather(-1, index).sum()
        if not with_gradient:
            return total, None
        gradient = predicted.exp_()
        return total, gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))

    return _FusedHeadLoss.apply(rows, head, loss, chunk)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Returns the label that each position predicts, that of the next one; `IGNORED` at the end."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def head_input(model: Any, head: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the input of a causal language model's head, `[batch, tokens, hidden]`.

    Works through anything that wraps the model (PEFT, DistributedDataParallel), whose forward pass runs as usual.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    own = head.__dict__.get("forward")
    head.forward = lambda x: x
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        del head.forward
        if own is not None:
            head.forward = own


class _FusedHeadLoss(torch.autograd.Function):
    """Head and loss, chunk by chunk; keeps the gradient of the head's input alone."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, head: nn.Module, loss: ChunkLoss, chunk: int | None) -> torch.Tensor:
        """`rows` is `[positions, width]`."""
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if needed else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        if chunk is None and len(rows):
            with torch.no_grad():
                chunk = max(1, _CHUNK_ELEMENTS // head(rows[:1]).shape[-1])
        for start in range(0, len(rows), chunk or 1):
            positions = slice(start, start + (chunk or 1))
            part = rows[positions].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):  # of the head's input only: the graph lives for one chunk
                logits = head(part)
            value, logits_gradient = loss(logits.detach().float(), positions, needed)
            total += value
            if gradient is not None and logits_gradient is not None:
                (gradient[positions],) = torch.autograd.grad(logits, part, logits_gradient.to(logits.dtype))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grad` is a scalar."""
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad, None, None, None


@torch.no_grad()
def _logits(head: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return head(rows).to(torch.float32, copy=True)


def _rows(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return hidden.flatten(0, -2) if mask is None or bool(mask.all()) else hidden[mask]
