"""This project's own plugin: the modifiers, architectures and recipes come in through the same hooks as anyone's."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES, Architecture
from quad_modifiers.plugins.hookspecs import hookimpl
from quad_modifiers.recipe.resolve import builtin_recipe_folder


@hookimpl
def quad_modifiers_modifiers() -> Mapping[str, str]:
    """The modifiers of this project by recipe name."""
    return {
        "SVDOutlierProjection": "quad_modifiers.modifiers.svd_outlier_projection:SVDOutlierProjection",
        "FlattenedRotation": "quad_modifiers.modifiers.flattened_rotation:FlattenedRotation",
        "LowRankBranch": "quad_modifiers.modifiers.low_rank_branch:LowRankBranch",
        "OutlierSplitGPTQ": "quad_modifiers.modifiers.outlier_split_gptq:OutlierSplitGPTQ",
        "EmbeddingHeadQuant": "quad_modifiers.modifiers.embedding_head_quant:EmbeddingHeadQuant",
        "OutlierLoRA": "quad_peft.modifier:OutlierLoRA",
        "DynamicActQuant": "quad_modifiers.modifiers.dynamic_act_quant:DynamicActQuant",
        "KVCacheQuant": "quad_modifiers.modifiers.kv_cache_quant:KVCacheQuant",
    }


@hookimpl
def quad_modifiers_architectures() -> Sequence[Architecture]:
    """Llama, Mistral, Qwen2 / 2.5 and Qwen3."""
    return BUILTIN_ARCHITECTURES


@hookimpl
def quad_modifiers_linear_terms() -> Mapping[str, str]:
    """What a linear may have beside its residual and outlier parts."""
    return {"low_rank_branch": "quad_modifiers.nn.branch_term:BranchTerm"}


@hookimpl
def quad_modifiers_checkpoint_sections() -> Mapping[str, str]:
    """What a checkpoint holds beyond its linears."""
    return {
        "head_transform": "quad_modifiers.checkpoint.head_transform:HeadTransform",
        "kv_cache": "quad_modifiers.checkpoint.cache_section:KVCacheSection",
    }


@hookimpl
def quad_modifiers_recipe_folders() -> Sequence[Path]:
    """The folder recipes/."""
    return [builtin_recipe_folder()]
