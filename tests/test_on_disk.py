"""Tensors whose memory is a file."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from quad_modifiers.on_disk import LEAST, let_go, offloading, on_disk, rest, unchanged_kept

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="is for Linux")

SIDE = 512
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32]


def is_file(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor is a file that has no name any more."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "(deleted)" in line
    return False


def resident(tensor: torch.Tensor) -> int:
    """Bytes of memory that the mapping of a tensor takes."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "Rss:":
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_values_are_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    values = (torch.randn(SIDE, 4 * SIDE) * 50).to(dtype)
    with offloading(tmp_path):
        found = on_disk(values.T)  # not contiguous
    assert is_file(found)
    assert found.dtype == dtype
    assert torch.equal(found, values.T)
    found += 1
    assert torch.equal(found, values.T + 1)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_given_back_and_nothing_is_lost(tmp_path: Path) -> None:
    values = torch.randn(SIDE, 8 * SIDE)
    with offloading(tmp_path):
        found = on_disk(values)
        assert torch.equal(found, values)
        assert resident(found) >= values.numel() * 4
        let_go(found)
        assert resident(found) < values.numel()
        found[:100] = 7.0  # which is no longer what the file says
        let_go(found)
    assert torch.equal(found[100:], values[100:])
    assert (found[:100] == 7.0).all()


def test_small_ones_and_those_outside_stay(tmp_path: Path) -> None:
    small, large = torch.zeros(LEAST // 4 - 1), torch.zeros(LEAST // 4)
    with offloading(tmp_path):
        assert on_disk(small) is small
        assert on_disk(large) is not large
        with offloading(None):
            assert on_disk(large) is large
    assert on_disk(large) is large


def test_a_module_rests_in_files(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE, bias=False), nn.BatchNorm1d(2 * LEAST))
    module[1].weight = module[0].weight  # tied
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with offloading(tmp_path):
        rest(module)
        at = module[0].weight.data_ptr()
        rest(module)  # what is in a file is not written again
    assert module[0].weight.data_ptr() == at
    assert module[1].weight is module[0].weight
    assert is_file(module[0].weight)
    assert is_file(module[2].running_mean)
    assert not is_file(module[0].bias)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_is_only_read_stays_in_its_file(tmp_path: Path) -> None:
    module = nn.ModuleList([nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)]).bfloat16()
    with offloading(tmp_path):
        rest(module)
        at = [each.weight.data_ptr() for each in module]
        with torch.no_grad(), unchanged_kept(module):
            module.float()
            module[1].weight[3, 3] = 9.0
            module.bfloat16()
    assert module[0].weight.data_ptr() == at[0]
    assert module[1].weight.data_ptr() != at[1]
    assert module[1].weight[3, 3] == 9.0


def test_a_file_system_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path, flags, *arguments, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    values = torch.randn(SIDE, SIDE)
    with offloading(tmp_path):
        found = on_disk(values)
    assert torch.equal(found, values)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with offloading(tmp_path), pytest.raises(OSError, match="has no room for what does not fit in memory"):
        on_disk(torch.zeros(SIDE, SIDE))
