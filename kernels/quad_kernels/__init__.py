"""Operations that a QUAD checkpoint needs at run time; imports neither `quad_modifiers` nor `quad_peft`.

Each operation is a sub-package with a plain PyTorch `reference.py` that is the truth for every faster backend.
"""
