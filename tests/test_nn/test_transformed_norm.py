"""A norm that multiplies by a matrix, and is a norm again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from quad_modifiers.nn.native_block import NativeNorm, install_native_blocks, remove_native_blocks
from quad_modifiers.nn.transformed_norm import TransformedNorm, add_head_transform, remove_head_transform


@pytest.fixture
def norm() -> LlamaRMSNorm:
    made = LlamaRMSNorm(8, eps=1e-6)
    made.weight.data = torch.linspace(0.5, 2, 8)
    return made


@pytest.fixture
def matrix() -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def test_it_multiplies_and_stops(norm: LlamaRMSNorm, matrix: torch.Tensor) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    plain = norm(x)
    add_head_transform(norm, matrix)
    assert isinstance(norm, LlamaRMSNorm)
    assert set(norm.state_dict()) == {"weight", "head_transform"}
    torch.testing.assert_close(norm(x), plain @ matrix.T)
    assert torch.equal(remove_head_transform(norm), matrix)
    assert type(norm) is LlamaRMSNorm
    assert torch.equal(norm(x), plain)


def test_copies_and_pickles(norm: LlamaRMSNorm, matrix: torch.Tensor) -> None:
    add_head_transform(norm, matrix)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
        assert type(twin) is type(norm)
        assert twin.head_transform is not norm.head_transform


def test_it_gets_the_native_norm_below(norm: LlamaRMSNorm, matrix: torch.Tensor, make_toy) -> None:
    layers = list(make_toy(num_hidden_layers=1).model.layers)
    add_head_transform(norm, matrix)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    wanted = norm(x)
    install_native_blocks(layers, nn.Identity(), norm)
    if not isinstance(norm, NativeNorm):
        pytest.skip("no native kernels")
    assert isinstance(norm, TransformedNorm)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), wanted)
    remove_native_blocks(norm)
    assert not isinstance(norm, NativeNorm)
    with torch.no_grad():
        assert torch.equal(norm(x), wanted)
