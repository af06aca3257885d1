"""Stock transformers in a process that cannot import this project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

_CODE = """
import sys
sys.modules["quad_modifiers"] = None  # any import of this project fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2] + "/ids.pt")).logits, sys.argv[2] + "/logits.pt")
print(type(model).__name__)
"""


def logits_without_us(folder: Path, ids: torch.Tensor, scratch: Path) -> tuple[str, torch.Tensor]:
    """Class name and logits of stock transformers in a process that cannot import this project."""
    torch.save(ids, scratch / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CODE, str(folder), str(scratch)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1], torch.load(scratch / "logits.pt")
