"""Public names of the last release still work, and say what they are called now."""

import pytest
import quad_kernels
import torch


def test_an_old_name_gives_the_new_thing_and_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"quad_kernels\.int4_linear is now quad_kernels\.integer_linear"):
        assert quad_kernels.int4_linear is quad_kernels.integer_linear


@pytest.mark.parametrize("layout", ["int8", "nibbles", "onednn"])
def test_the_old_weight_still_tells_its_layout_by_the_dtype(layout: str) -> None:
    integers = torch.randint(-8, 8, (3, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight = quad_kernels.QuantizedWeight(integers, torch.ones(3, 1), None, 64, 3, 4).to_layout(layout)
    with pytest.warns(DeprecationWarning, match=r"quad_kernels\.LinearWeight is now quad_kernels\.QuantizedWeight"):
        old = quad_kernels.LinearWeight(weight.integers, weight.scale, None, 64, 3, 4)
    assert isinstance(old, quad_kernels.QuantizedWeight)
    assert old.layout == weight.layout
    assert torch.equal(old.to_layout("int8").integers, integers)


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'quad_kernels' has no attribute 'int5_linear'"):
        _ = quad_kernels.int5_linear
