"""`python -m quad_modifiers.bench`: measurements of what README.md claims."""
