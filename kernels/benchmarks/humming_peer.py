"""The peer on NVIDIA GPUs: `humming-kernels` (PyPI, written for 0.1.19), which compiles its kernels when it runs.

    python -m benchmarks.humming_peer --models llama-3-8b --tokens 1 16 2048

compiles what a benchmark of these cases will need, in parallel, into humming's cache.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.methods import Setting
from benchmarks.shapes import REAL_MODELS, SQUARE, Linear, cases
from benchmarks.timing import describe

ARITHMETICS: dict[str, str | None] = {"humming_w4a4": "int4", "humming_w4a8": "int8", "humming_w4a16": None}
_LARGEST_ERROR = 0.5  # relative; round-to-nearest W4A4 on normal numbers is near 0.25, a wrong call above 1


class HummingBudget:
    """Seconds that building and compiling its layers may take in all."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def spend(self, seconds: float) -> None:
        """Takes seconds from it."""
        self._left -= seconds

    def check(self) -> None:
        """Raises TimeoutError if nothing is left."""
        if self._left <= 0:
            raise TimeoutError("the time for compiling humming-kernels is used up (--peer-seconds)")


class HummingLayer:
    """Its layer at one scale per token and channel, with its own activation quantization, without bias and outliers."""

    def __init__(
        self,
        linear: Linear,
        setting: Setting,
        generator: torch.Generator,
        arithmetic: str,
        tokens: Sequence[int],
        budget: HummingBudget,
    ) -> None:
        budget.check()
        start = time.perf_counter()
        self._setting, self._inputs = setting, linear.inputs
        weight = (setting.normal(linear.outputs, linear.inputs, generator=generator) * 0.02).to(setting.dtype)
        layer = _build(linear, setting, ARITHMETICS[arithmetic])
        layer.load_from_unquantized(weight)
        layer.transform()
        self._configs = _configs(layer, tokens)
        _compile([(layer, list(self._configs.values()))])
        x = self.make_input(min(tokens), generator)
        truth = F.linear(x, weight).float()
        error = float((layer(x, tuning_config=self._configs[len(x)]).float() - truth).norm() / truth.norm())
        if not error <= _LARGEST_ERROR:
            raise ValueError(f"{arithmetic} differs from F.linear by {error:.2f}: it is not called as it should be")
        self.copies = setting.copies(linear.outputs * linear.inputs // 2)
        self._layers = [layer] + [copy.deepcopy(layer) for _ in range(self.copies - 1)]
        budget.spend(time.perf_counter() - start)

    def make_input(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """See `benchmarks.methods.Layer`."""
        return self._setting.normal(tokens, self._inputs, generator=generator)

    def __call__(self, x: torch.Tensor, copy: int) -> torch.Tensor:
        """See `benchmarks.methods.Layer`."""
        return self._layers[copy % self.copies](x, tuning_config=self._configs[len(x)])


def _build(linear: Linear, setting: Setting, activations: str | None) -> Any:
    from humming.layer import HummingLayer as Peer

    return Peer(
        shape_n=linear.outputs,
        shape_k=linear.inputs,
        weight_config={"dtype": "int4"},
        input_config={"dtype": activations} if activations else None,
        torch_dtype=setting.dtype,
    ).to(setting.device)


def _configs(layer: Any, tokens: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Its own choice for each number of tokens; left alone it compiles those of all numbers of tokens, about 90."""
    from humming.tune import get_heuristics_config

    return {count: get_heuristics_config(layer.humming_config, shape_m=count) for count in tokens}


def _compile(layers: Sequence[tuple[Any, list[dict[str, Any]]]]) -> None:
    """Compiles the kernels of all layers at once."""
    from humming.kernel.humming import HummingKernel

    kernels = []
    for layer, configs in layers:
        for config in configs:
            kernel = {**HummingKernel._resolve_configs(layer.humming_config.to_str(), None, config)[0], **config}
            kernel.pop("num_sms", None)
            kernels.append((HummingKernel, kernel))
    HummingKernel.compile_many(kernels)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles ahead; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.humming_peer", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["llama-3-8b"], choices=[*REAL_MODELS, SQUARE, "toy"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 2048])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    setting = Setting(torch.device("cuda"), getattr(torch, options.dtype), rotated_bytes=1)
    try:
        layers = []
        for linear in dict.fromkeys(
            linear for model in options.models for case in cases(model) for linear in case.linears
        ):
            for activations in ARITHMETICS.values():
                layer = _build(linear, setting, activations)
                layer.load_from_unquantized(
                    torch.randn(linear.outputs, linear.inputs, device="cuda", dtype=setting.dtype)
                )
                layer.transform()
                layers.append((layer, list(_configs(layer, options.tokens).values())))
        _compile(layers)
    except Exception as error:  # whatever it is, the benchmark continues without the peer
        print(f"humming-kernels cannot be compiled here: {describe(error)}")
        return 1
    print(f"humming-kernels: compiled {len(layers)} layers in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
