"""What a command took: peak memory of this process, and the folder of the original model."""

import sys
from pathlib import Path


def peak_memory() -> str:
    """Returns the largest resident memory of this process so far, and of its CUDA device if it used one."""
    import torch

    parts = []
    if sys.platform != "win32":  # Windows has no getrusage
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        parts.append(f"{(peak if sys.platform == 'darwin' else peak * 1024) / 2**30:.2f} GiB")
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU")
    return ", ".join(parts) or "not measured on this platform"


def original_folder(model: str) -> Path | None:
    """Returns the folder of a model that was just loaded, in the Hub's cache for a Hub id.

    None if it holds no safetensors files.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return folder if any(folder.glob("*.safetensors")) else None
