"""How far a model is from the original on the validation samples."""

import math
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from quad_peft.training.data import Collator, Samples
from quad_peft.training.losses import IGNORED, distillation_loss, head_input, next_token_loss, shifted
from quad_peft.training.teacher import Teacher


class Quality(NamedTuple):
    """Means over all positions of the validation samples.

    Attributes:
        perplexity: perplexity of the model.
        divergence: KL(original || model) in nats, None without an original.
        original_perplexity: perplexity of the original, None without one.
    """

    perplexity: float
    divergence: float | None = None
    original_perplexity: float | None = None

    @property
    def loss(self) -> float:
        """What is trained: the divergence, without an original the cross-entropy of the next token, in nats."""
        return math.log(self.perplexity) if self.divergence is None else self.divergence


@torch.no_grad()
def measure(
    model: Any, samples: Samples, collator: Collator, batch_size: int = 1, teacher: Teacher | None = None
) -> Quality:
    """Runs the model over samples in evaluation mode; it comes back in the mode it had."""
    device, was_training, head = model.device, model.training, model.get_output_embeddings()
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    batches = DataLoader(samples, batch_size=batch_size, collate_fn=collator)
    for batch in tqdm(batches, desc="validation samples", unit="batch", leave=False):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        hidden = head_input(model, head, batch)
        targets, kept = shifted(batch["labels"]), batch["labels"] != IGNORED
        sums[0] += next_token_loss(hidden, head, targets).cpu()
        counts += torch.stack([(targets != IGNORED).sum(), kept.sum()]).cpu()
        if teacher is not None:
            taught = teacher.hidden_states(batch)
            sums[1] += next_token_loss(taught, teacher.head, targets).cpu()
            sums[2] += distillation_loss(hidden, head, taught, teacher.head, kept).cpu()
    model.train(was_training)
    own, original, divergence = (sums / counts[[0, 0, 1]]).tolist()
    return Quality(_exp(own)) if teacher is None else Quality(_exp(own), divergence, _exp(original))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
