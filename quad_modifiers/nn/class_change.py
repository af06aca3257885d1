"""A module that becomes one of another class, with its parameters, buffers and hooks."""

from torch import nn


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Changes the class of a module.

    The bound forward of the old class may lie in the module itself, where it would hide the new one: llm-compressor
    leaves it behind, and accelerate calls it from its hooks.
    """
    old = [base.__dict__["forward"] for base in type(module).__mro__ if "forward" in base.__dict__]
    module.__class__ = kind
    if getattr(module.__dict__.get("forward"), "__func__", None) in old:
        del module.forward
    if getattr(module.__dict__.get("_old_forward"), "__func__", None) in old:
        module._old_forward = kind.forward.__get__(module)
