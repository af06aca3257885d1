"""transformers' Trainer with the fused losses, and a guard against NaN."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from quad_peft.integer_change import integer_changes
from quad_peft.training.losses import IGNORED, distillation_loss, head_input, next_token_loss, shifted
from quad_peft.training.phases import FixIntegers, first_fixed_step, with_two_phases
from quad_peft.training.teacher import Teacher


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite. The weights are those from before the step."""


class QuadTrainer(Trainer):
    """Trainer that never holds the logits of a whole batch; with a teacher, by distillation from it.

    The loss of a step is the mean over its positions, exactly, however it is padded, accumulated or distributed.

    Args:
        teacher: the original model; None trains on the next token.
        temperature: temperature of the distillation.
        weight_learning_rate: largest learning rate of changes of integers, in steps of the grid; None is that of all.
        fixed_share: share of the steps, at the end, in which integers stay as they are.
        arguments: arguments of `transformers.Trainer`. Batches are those of `Collator`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None = None,
        temperature: float = 1.0,
        weight_learning_rate: float | None = None,
        fixed_share: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(*args, **arguments)
        self.teacher, self.temperature = teacher, temperature
        self.weight_learning_rate, self.fixed_share = weight_learning_rate, fixed_share
        self.model_accepts_loss_kwargs = True  # the mean is taken here, over all batches of a step
        self.can_return_loss = True
        if any(parameter.requires_grad for parameter in self.model.get_output_embeddings().parameters()):
            raise ValueError(
                "the head is trainable, but the fused losses give it no gradient; use transformers.Trainer"
            )
        self.add_callback(StopOnNonFinite())
        if integer_changes(self.model):
            self.add_callback(FixIntegers(fixed_share, freeze=self.args.world_size == 1))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As transformers' own, with a learning rate of their own for changes of integers."""
        changes = {id(change) for change in integer_changes(self.model)}
        if getattr(self, "optimizer", None) is not None or not changes:
            return super().create_optimizer(model)
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rate = self.args.learning_rate if self.weight_learning_rate is None else self.weight_learning_rate
        groups = [
            {"params": [parameter for parameter in trained if id(parameter) not in changes]},
            {"params": [parameter for parameter in trained if id(parameter) in changes], "lr": rate},
        ]
        self.optimizer = kind(groups, **{**arguments, "weight_decay": 0.0})
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers' own, with one for changes of integers that ends where they are fixed."""
        if getattr(self, "lr_scheduler", None) is not None or not integer_changes(self.model):
            return super().create_scheduler(num_training_steps, optimizer)
        fixed_from = first_fixed_step(num_training_steps, self.fixed_share)
        warmup = self.args.get_warmup_steps(num_training_steps)
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = with_two_phases(optimizer, warmup, num_training_steps, fixed_from, [False, True])
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """Collects the batches of a step and counts the positions that its loss is the mean over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(int(self._counted(batch).sum()) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, as its share of the step's mean; in an evaluation, the mean over the batch."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        hidden = head_input(model, head, inputs)
        with self.accelerator.autocast():
            total = self._sum(hidden, head, inputs)
        if model.training and num_items_in_batch is not None:
            # Processes average their gradients.
            loss = total * self.accelerator.num_processes / num_items_in_batch
        else:
            loss = total / self._counted(inputs).sum()
        return (loss, {"loss": loss}) if return_outputs else loss

    def _sum(self, hidden: torch.Tensor, head: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.teacher is None:
            return next_token_loss(hidden, head, shifted(inputs["labels"]))
        taught = self.teacher.hidden_states(inputs)
        return distillation_loss(
            hidden, head, taught, self.teacher.head, self._counted(inputs), temperature=self.temperature
        )

    def _counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions of a batch that the loss is the mean over, `[batch, tokens]`, bool."""
        labels = batch["labels"]
        return (shifted(labels) if self.teacher is None else labels) != IGNORED


class StopOnNonFinite(TrainerCallback):
    """Stops before the step that would write NaN into the weights; for any Trainer.

    Raises:
        NonFiniteError: naming the step.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        """Looks at the gradients. A loss that is NaN has no other."""
        gradients = [p.grad for p in context["model"].parameters() if p.grad is not None]
        if gradients and not torch.stack([g.isfinite().all() for g in gradients]).all():
            raise NonFiniteError(
                f"the loss or its gradient became NaN or infinite at step {state.global_step + 1} of "
                f"{state.max_steps}; lower the learning rate, or look for damaged text in the data"
            )
