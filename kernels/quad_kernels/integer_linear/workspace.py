"""Counters by which the programs that share a tile find out which of them comes last."""

import torch

_PER_STREAM = 1 << 14
_PER_SUPPLY = 1 << 20

_streams: dict[tuple[int | None, int], torch.Tensor] = {}
_supplies: dict[int | None, list[torch.Tensor]] = {}  # per device; only the last is not used up, graphs read all
_used: dict[int | None, int] = {}  # counters of the last supply


def arrival_counters(count: int, device: torch.device) -> torch.Tensor:
    """Returns `count` or more zeros, int32, for one launch; the kernel leaves them at zero.

    Launches on one stream run one after the other and share their counters. A launch that is recorded in a CUDA graph
    gets counters of its own for good, because graphs may be replayed beside each other on any stream. They come out of
    a supply that is made outside of recordings: zeroing one during a recording would be replayed, and is done only
    where the supply does not suffice.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        used = _used.get(device.index, _PER_SUPPLY)
        if used + count > _PER_SUPPLY:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _used[device.index] = used + count
        return _supplies[device.index][-1][used : used + count]
    if 2 * _used.get(device.index, _PER_SUPPLY) > _PER_SUPPLY:
        _supplies.setdefault(device.index, []).append(torch.zeros(_PER_SUPPLY, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()  # the graphs may run on other streams
        _used[device.index] = 0
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    counters = _streams.get(key)
    if counters is None or counters.numel() < count:
        _streams[key] = counters = torch.zeros(max(count, _PER_STREAM), dtype=torch.int32, device=device)
    return counters
