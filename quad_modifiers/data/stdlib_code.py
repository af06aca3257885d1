"""Sources of Python's standard library as a code corpus: on every machine, no download."""

import sysconfig
from functools import lru_cache
from pathlib import Path

from quad_modifiers.data.wikipedia import TextPart, half_of

# Present in every Python from 3.10 to 3.14, 5 to 110 kB each, no tests and no generated tables. Kept sorted: the order
# decides which half a module falls in.
_MODULES = """
argparse ast bdb calendar cmd codecs configparser contextlib copy csv dataclasses difflib dis doctest enum
fileinput fractions ftplib functools gettext gzip heapq imaplib inspect ipaddress locale mailbox mimetypes
optparse pdb pickle platform plistlib pprint queue random selectors shutil smtplib socket socketserver ssl
statistics subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback types typing uuid
warnings weakref zipfile
"""


def stdlib_code(part: TextPart) -> list[str]:
    """Returns the source of standard-library modules of one half, in alphabetical order of the modules.

    The text depends on the running Python version: compare numbers only within one version.

    Args:
        part: "calibration" for the first half of the modules, "held_out" for the second half.

    Raises:
        ValueError: if `part` is neither of the two.
        FileNotFoundError: if this Python ships without the sources of its standard library.
    """
    return list(half_of(_all_sources(), part))


@lru_cache(maxsize=1)
def _all_sources() -> tuple[str, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    return tuple(_source_file(folder, module).read_text(encoding="utf-8").strip() for module in _MODULES.split())


def _source_file(folder: Path, module: str) -> Path:
    for candidate in (folder / f"{module}.py", folder / module / "__init__.py"):  # some became packages
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"this Python has no source for its standard module {module!r}; "
        "use a Python that ships .py files, or give your own text"
    )
