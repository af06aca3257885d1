"""Compresses toys on a second device: `python tests/another_device/imitation.py FOLDER RECIPE...`.

The device is an imitation: its tensors lie in ordinary memory and are computed on the CPU, but torch refuses to mix
them with the CPU's, as with a GPU's. FOLDER is for what is compiled. Prints a line of JSON for each recipe and each
place of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "imitation"


def install(folder: Path) -> None:
    """Compiles the device and makes it known to torch, for the rest of the process."""
    from torch.utils.cpp_extension import include_paths, library_paths

    source, library = Path(__file__).with_name("other_device.cpp"), folder / "other_device.so"
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-ltorch", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    compiler = os.environ.get("CXX", "c++")
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", abi, *includes]
    subprocess.run([compiler, *options, str(source), "-o", str(library), *libraries], check=True)
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(NAME)
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)


def compressed(recipe: str, place: str, device: str) -> torch.nn.Module:
    """A toy that lies in one place and was worked on in another."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from quad_modifiers import oneshot

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=320, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(place)
    windows = list(torch.randint(320, (4, 64)))
    oneshot(model, recipe, dataset=windows, num_calibration_samples=4, max_seq_length=64, device=device)
    return model


def tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def main() -> None:
    """Prints what came of each run."""
    folder, *recipes = sys.argv[1:]
    install(Path(folder))
    ids = torch.arange(32)[None] * 7
    for recipe in recipes:
        wanted = compressed(recipe, "cpu", "cpu")(ids).logits
        for place in ("cpu", NAME):
            model = compressed(recipe, place, NAME)
            places = sorted({tensor.device.type for tensor in tensors(model)})
            logits = model(ids.to(place)).logits.cpu()
            error = float((logits - wanted).norm() / wanted.norm())
            print(json.dumps({"recipe": recipe, "place": place, "places": places, "error": error}), flush=True)


if __name__ == "__main__":
    main()
