"""How long idle threads of a command wait for work before they sleep."""

import os
import sys

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPINS = "3000"  # of 300000: one process alone is as fast as before, and two on the same cores 2.7 times as fast


def wait_briefly() -> None:
    """Lets idle threads of GNU's OpenMP, PyTorch's on Linux, sleep after microseconds instead of milliseconds.

    They wait by counting, and processes that count on the same processors stop each other. This works before torch is
    loaded only, and changes nothing where the user has set something.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
