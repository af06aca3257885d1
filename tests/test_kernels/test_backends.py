"""Registration and choice of kernel backends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from quad_kernels import Backend, BackendError, InputQuantization, backends, choose_backend, quantize_activations
from quad_kernels.backends import register_backend, register_backend_path, temporary_registrations
from quad_kernels.backends.native_cpu import NativeBackend

_missing = NativeBackend().unavailable(torch.device("cpu"))
CPU = "native" if _missing is None else "onednn"  # an installation without a compiler has no native kernels
CHOICE = "kernels on cpu: native" if _missing is None else f"kernels on cpu: onednn (native cannot run: {_missing})"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("QUAD_KERNELS", raising=False)
    with temporary_registrations():
        yield


class Doubling(Backend):
    name = "doubling"
    priority = 99
    devices = ("cpu",)

    def quantize_activations(self, x, quantization, split, norm, packed):
        return super().quantize_activations(2 * x, quantization, split, norm, packed)


class Broken(Backend):
    name = "broken"
    priority = 100

    def unavailable(self, device):
        return "it has no batteries"


def test_the_cpu_has_its_own_and_other_devices_fall_back_to_the_reference() -> None:
    assert choose_backend("cpu").name == CPU
    assert choose_backend("meta").name == "reference"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="quad_kernels"):
        choose_backend("cpu")
        choose_backend("cpu")
    assert [record.getMessage() for record in caplog.records] == [CHOICE]


def test_one_that_cannot_run_is_passed_over_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    register_backend(Broken())
    with caplog.at_level(logging.INFO, logger="quad_kernels"):
        assert choose_backend("cpu").name == CPU
    assert f"kernels on cpu: {CPU} (broken cannot run: it has no batteries" in caplog.text


def test_forced_by_argument_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cpu", "reference").name == "reference"
    monkeypatch.setenv("QUAD_KERNELS", "reference")
    assert choose_backend("cpu").name == "reference"
    assert choose_backend("cpu", "onednn").name == "onednn", "the argument goes first"


def test_forcing_what_cannot_run_says_why() -> None:
    register_backend(Broken())
    with pytest.raises(BackendError, match="'broken' cannot run on cpu: it has no batteries"):
        choose_backend("cpu", "broken")
    with pytest.raises(BackendError, match="'onednn' cannot run on meta: it is for tensors on the CPU"):
        choose_backend("meta", "onednn")


def test_the_name_of_the_last_release_still_forces_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cpu", "cpu") is choose_backend("cpu", "onednn")
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    by_alias = quantize_activations(x, InputQuantization(8), backend="cpu")
    assert torch.equal(by_alias.integers, quantize_activations(x, InputQuantization(8), backend="onednn").integers)
    monkeypatch.setenv("QUAD_KERNELS", "cpu")
    assert choose_backend("cpu").name == "onednn"
    assert "cpu" not in backends()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"no kernel backend 'gpu'; there are native, onednn, .*reference"):
        choose_backend("cpu", "gpu")


def test_an_added_backend_runs_by_its_priority() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = quantize_activations(x, InputQuantization(8))
    register_backend(Doubling())
    after = quantize_activations(x, InputQuantization(8))
    assert torch.equal(after.scale, 2 * before.scale)
    assert torch.equal(quantize_activations(x, InputQuantization(8), backend="onednn").scale, before.scale)


def test_a_name_can_be_taken_once() -> None:
    class Other(Backend):
        name = "cpu"

    with pytest.raises(ValueError, match="a kernel backend named 'cpu' exists already"):
        register_backend(Other())
    with pytest.raises(ValueError, match=r"named .cpu. exists already; my-dist 1\.0 cannot add another"):
        register_backend_path("cpu", "module:Class", "my-dist 1.0")
    with pytest.raises(ValueError, match=r"named .onednn. exists already; my-dist 1\.0 cannot add another"):
        register_backend_path("onednn", "module:Class", "my-dist 1.0")


def test_a_path_may_be_registered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as the libraries of its plugin are imported, before and after the backend itself is."""
    module = ModuleType("again")
    module.Again = type("Again", (Backend,), {"name": "again"})
    monkeypatch.setitem(sys.modules, "again", module)
    for _ in range(2):
        register_backend_path("again", "again:Again", "my-dist 1.0")
    assert "again" in backends()
    register_backend_path("again", "again:Again", "my-dist 1.0")
    assert "again" in backends()
    with pytest.raises(ValueError, match=r"named .again. exists already; other-dist 2\.0 cannot add another"):
        register_backend_path("again", "again:Again", "other-dist 2.0")


def test_a_backend_of_the_last_release_is_refused_with_what_to_change() -> None:
    class Old(Backend):
        name = "old"

        def int4_linear(self, x, x_scale, weight, outlier, outlier_weight, bias, out_dtype):
            return x

    with pytest.raises(TypeError, match=r"'old' has a method int4_linear, .* it is integer_linear\(operands"):
        register_backend(Old())
    assert "old" not in backends()


def test_registrations_inside_the_context_are_undone() -> None:
    with temporary_registrations():
        register_backend(Doubling())
        register_backend_path("mine", "no_such_module:Thing", "my-dist 1.0")
        assert choose_backend("cpu").name == "doubling"
        with pytest.raises(BackendError, match="cannot be used"):
            choose_backend("cpu", "mine")
    assert choose_backend("cpu").name == CPU
    with pytest.raises(BackendError, match="there is no kernel backend 'mine'"):
        choose_backend("cpu", "mine")


def test_choices_are_made_anew_inside_the_context(caplog: pytest.LogCaptureFixture) -> None:
    choose_backend("cpu")
    with caplog.at_level(logging.INFO, logger="quad_kernels"), temporary_registrations():
        choose_backend("cpu")
    assert [record.getMessage() for record in caplog.records] == [CHOICE]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("module_with_kernels")
    module.Doubling = Doubling  # type: ignore[attr-defined]
    module.text = "no backend"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_contributed_backend_is_imported_at_the_first_choice(module: ModuleType) -> None:
    register_backend_path("doubling", f"{module.__name__}:Doubling", "my-dist 1.0")
    imported: list[str] = []
    module.__getattr__ = lambda name: imported.append(name) or Doubling  # type: ignore[attr-defined, func-returns-value]
    del module.Doubling
    assert imported == []
    assert choose_backend("cpu").name == "doubling"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_module:Thing", "my-dist 1.0: ModuleNotFoundError: No module named 'no_such_module'"),
        ("module_with_kernels:Nothing", "my-dist 1.0: AttributeError"),
        ("module_with_kernels:text", "my-dist 1.0: TypeError: module_with_kernels:text is not a quad_kernels.Backend"),
        ("module_with_kernels:Doubling", "my-dist 1.0: TypeError: .* of the name 'mine'"),
    ],
)
def test_a_contributed_backend_that_fails_is_left_out(
    path: str, reason: str, module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    register_backend_path("mine", path, "my-dist 1.0")
    assert choose_backend("cpu").name == CPU
    assert "the kernel backend 'mine' cannot be used" in caplog.text
    assert "mine" not in backends()
    with pytest.raises(BackendError, match=reason):
        choose_backend("cpu", "mine")
