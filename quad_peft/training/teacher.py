"""What the original model says about the training samples: its last hidden states, to which its head is applied.

A vocabulary is hundreds of times wider than a hidden state, so hidden states are what is kept, in the model's dtype:
the logits made from them are those of the original model, bit for bit.
"""

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from quad_modifiers.output_folder import check_space, file_complete_or_absent
from quad_peft.training.losses import head_input

logger = logging.getLogger(__name__)

SAMPLES_PER_FILE = 64  # what an interruption can lose


class Teacher(Protocol):
    """The original model as the trainer needs it.

    Attributes:
        head: module from hidden states to logits.
    """

    head: nn.Module

    def hidden_states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns `[batch, tokens, hidden]` for a batch of `Collator`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Holds a model in evaluation mode; it returns to the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class LiveTeacher:
    """The original model itself, run when it is asked; nothing is kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head: nn.Module = model.get_output_embeddings()

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Teacher`."""
        device = batch["input_ids"].device
        if self.model.device != device:
            self.model.to(device)
        with evaluating(self.model):
            return head_input(self.model, self.head, batch)


class CachedTeacher:
    """Hidden states in a folder of `cache_teacher` and a copy of the head; the model is not in memory."""

    def __init__(self, folder: Path, head: nn.Module) -> None:
        self.folder, self.head = folder, head

    def hidden_states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """See `Teacher`."""
        device = batch["input_ids"].device
        if next(self.head.parameters()).device != device:
            self.head.to(device)
        rows = [self._read(place) for place in batch["place"].tolist()]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)

    def _read(self, place: int) -> torch.Tensor:
        with safe_open(_shard_file(self.folder, place // SAMPLES_PER_FILE), framework="pt") as shard:
            states: torch.Tensor = shard.get_tensor(str(place))
        return states


@torch.no_grad()
def cache_teacher(model: Any, samples: Sequence[torch.Tensor], folder: Path) -> CachedTeacher:
    """Writes a model's last hidden states for all samples, or finds them there.

    They go to a subfolder named by a hash of the model's weights and the samples, so that one folder serves several
    models and texts. After an interruption the next call resumes where it stopped.

    The model is only read, and may change afterwards. A disk that is too small is an OSError before the work begins.
    """
    own, head = folder / f"teacher-{_key(model, samples)}", model.get_output_embeddings()
    own.mkdir(parents=True, exist_ok=True)
    count = -(-len(samples) // SAMPLES_PER_FILE)
    missing = [index for index in range(count) if not _shard_file(own, index).is_file()]
    if missing:
        width, size = head.weight.shape[1], model.dtype.itemsize
        tokens = sum(len(sample) for index in missing for sample in _shard(samples, index))
        check_space(own / "states", tokens * width * size)
        logger.info("teacher: last hidden states of %d samples, %.1f MB", len(samples), tokens * width * size / 1e6)
    for index in tqdm(missing, desc="teacher", unit="file", leave=False, disable=not missing):
        states = {}
        for place, sample in enumerate(_shard(samples, index), start=index * SAMPLES_PER_FILE):
            with evaluating(model):
                hidden = head_input(model, head, {"input_ids": sample.unsqueeze(0).to(model.device)})
            states[str(place)] = hidden.squeeze(0).cpu().contiguous()
        with file_complete_or_absent(_shard_file(own, index)) as temporary:
            save_file(states, temporary)
    return CachedTeacher(own, copy.deepcopy(head).requires_grad_(False))


def _shard(samples: Sequence[torch.Tensor], index: int) -> Sequence[torch.Tensor]:
    return samples[index * SAMPLES_PER_FILE : (index + 1) * SAMPLES_PER_FILE]


def _shard_file(folder: Path, index: int) -> Path:
    return folder / f"states-{index:05d}.safetensors"


def _key(model: nn.Module, samples: Sequence[torch.Tensor]) -> str:
    """A hash of every weight and every token."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little") + sample.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
