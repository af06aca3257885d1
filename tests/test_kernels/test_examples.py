"""The examples in the docstrings of the public functions give what they say."""

import doctest
import inspect
import sys

import pytest
import quad_kernels

PUBLIC = [getattr(quad_kernels, name) for name in quad_kernels.__all__]
FUNCTIONS = [thing for thing in PUBLIC if inspect.isfunction(thing)]


@pytest.mark.parametrize("module", sorted({thing.__module__ for thing in [*FUNCTIONS, quad_kernels.QuantizedWeight]}))
def test_examples(module: str) -> None:
    found = doctest.testmod(sys.modules[module], optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (found.failed, found.attempted > 0) == (0, True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_public_function_has_an_example(function: object) -> None:
    assert "Example:\n" in (function.__doc__ or "")
