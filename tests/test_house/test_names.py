"""One concept, one file name: a fuzzy finder has one answer."""

from collections import defaultdict

from .import_map import ROOT

PACKAGES = ("quad_modifiers", "quad_peft")  # the operations of quad_kernels share their names on purpose
# Names that more than one file has, and why.
SHARED = {
    "config.py": "vLLM's quantization config, and PEFT's config.py, layer.py, model.py of every method",
    "export.py": "the command `quad export`, named as all of cli/ is, and a documented import path",
    "models.py": "the classes that transformers and vLLM, the two runtimes, load a checkpoint with",
}


def test_no_two_files_share_a_name() -> None:
    files = defaultdict(list)
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            if file.stem not in ("__init__", "__main__"):
                files[file.name].append(str(file.relative_to(ROOT)))
    shared = {name: sorted(found) for name, found in files.items() if len(found) > 1}
    assert {name: shared[name] for name in shared.keys() - SHARED.keys()} == {}, "give one of them a name of its own"
    assert sorted(SHARED.keys() - shared.keys()) == [], "exceptions that are not needed any more"
