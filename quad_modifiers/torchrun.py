"""What torchrun told this process about those that it started; without it there is one."""

import os


def ranks_started() -> int:
    """Returns how many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def ranks_here() -> int:
    """Returns how many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def number_here() -> int:
    """Returns the number of this one among those on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def is_first_rank() -> bool:
    """Returns whether this process is the one that speaks for all."""
    return ranks_started() == 1 or int(os.environ.get("RANK") or 0) == 0
