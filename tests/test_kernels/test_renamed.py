"""Public names of the last release still work, and say what they are called now."""

import pytest
import quad_kernels


def test_an_old_name_gives_the_new_thing_and_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"quad_kernels\.int4_linear is now quad_kernels\.integer_linear"):
        assert quad_kernels.int4_linear is quad_kernels.integer_linear


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="module 'quad_kernels' has no attribute 'int5_linear'"):
        _ = quad_kernels.int5_linear
