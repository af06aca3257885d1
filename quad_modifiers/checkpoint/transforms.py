"""Online Hadamards as the `transform_config` of compressed-tensors, which vLLM applies on CUDA devices.

transformers 5.17 reads past it, without a word: what it computes from such a checkpoint is nonsense.
`apply_transforms` is the remedy for our own tools: compressed-tensors' own hooks on the model that transformers loaded.
"""

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from quad_kernels.hadamard import HadamardPlan, plan_hadamard
from quad_kernels.hadamard.construct import hadamard_factor
from safetensors import safe_open
from torch import nn

from quad_modifiers.checkpoint.describe import RoleFormats
from quad_modifiers.checkpoint.format import LinearFormat
from quad_modifiers.records.inventory import weight_files

FIELD = "transform_config"  # of quantization_config
_LOCATION = "input"
_LARGEST_FAST = 2**15  # widest vector of vLLM's fast transform

RUNTIME_NOTE = (
    "the online Hadamards are in transform_config, which vLLM applies on CUDA devices and on one of them only (no "
    "tensor or pipeline parallelism); transformers ignores it and computes nonsense, and vLLM fails on it on the CPU"
)


def transform_config(linears: RoleFormats) -> dict[str, Any]:
    """Returns the transforms of the inputs that have an online Hadamard, one scheme for each such role.

    A power of two is Sylvester's matrix, which runtimes know; of other sizes the checkpoint has to hold the matrix.
    """
    groups = {_scheme_name(role): _scheme(role, linear) for role, linear in linears.items() if linear.hadamard}
    return TransformConfig(config_groups=groups).model_dump(mode="json")


def transform_tensors(linears: RoleFormats, names: dict[str, str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns the matrices that runtimes do not know, `[block, block]`, entries 1 and -1, once for all layers.

    Args:
        linears: formats by role.
        names: path of the first linear of each role.
        dtype: of the matrices.
    """
    tensors = {}
    for role, linear in linears.items():
        plan = _plan(linear)
        if linear.hadamard and not _is_sylvester(plan):
            tensors[f"{names[role]}.{_scheme_name(role)}_{_LOCATION}.weight"] = _signs(plan).to(dtype)
    return tensors


def transform_problems(linear: LinearFormat) -> list[str]:
    """Returns what keeps a linear with an online Hadamard from being expressed."""
    problems = []
    if linear.outliers_per_block:
        problems.append("outliers beside an online Hadamard: a transform takes the whole input (rank 0 there)")
    if linear.bias:
        problems.append("vLLM adds no bias to a linear whose input it transforms")
    plan = _plan(linear)
    if _is_sylvester(plan) and plan.block > _LARGEST_FAST:
        problems.append(f"vLLM transforms at most {_LARGEST_FAST} coordinates at once, not {plan.block}")
    return problems


def transforms_of(config: Any) -> dict[str, Any] | None:
    """Returns the `transform_config` of a transformers config, or of the content of config.json; None without one."""
    section = config.get("quantization_config") if isinstance(config, dict) else None
    section = section or getattr(config, "quantization_config", None) or {}
    content: dict[str, Any] = section if isinstance(section, dict) else section.to_dict()
    return content.get(FIELD) or None


def transform_names(content: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names under which modules hold their transforms, such as "down_proj_hadamard_input"."""
    schemes = TransformConfig.model_validate(content).config_groups
    return tuple(f"{name}_{each.location}" for name, scheme in schemes.items() for each in scheme.apply)


def apply_transforms(model: nn.Module, content: dict[str, Any], folder: Path) -> None:
    """Attaches the transforms to the model that transformers loaded, with compressed-tensors' own hooks.

    Args:
        model: loaded from `folder`.
        content: the `transform_config`.
        folder: local folder with the weight files, which hold the matrices that are not Sylvester's.
    """
    apply_transform_config(model, TransformConfig.model_validate(content))
    marks = tuple(f".{name}." for name in transform_names(content))
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            stored = [name for name in list(opened.keys()) if any(mark in name for mark in marks)]
            for name in stored:  # one matrix, which all modules of a scheme share
                model.get_parameter(name).data.copy_(opened.get_tensor(name))


def _plan(linear: LinearFormat) -> HadamardPlan:
    return plan_hadamard(linear.split().residual_width)


def _is_sylvester(plan: HadamardPlan) -> bool:
    return plan.block & (plan.block - 1) == 0


def _scheme_name(role: str) -> str:
    return f"{role}_hadamard"


def _scheme(role: str, linear: LinearFormat) -> TransformScheme:
    plan = _plan(linear)
    return TransformScheme(
        type="hadamard" if _is_sylvester(plan) else "random-hadamard",
        apply=[TransformArgs(targets=[rf"re:.*\.{role}$"], location=_LOCATION)],
        head_dim=None if plan.block == plan.size else plan.block,
    )


def _signs(plan: HadamardPlan) -> torch.Tensor:
    """One block of the transform, not normalised, `[block, block]`, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in plan.factors:
        matrix = torch.kron(matrix, hadamard_factor(order, torch.float64, torch.device("cpu")))
    return matrix.sign()
