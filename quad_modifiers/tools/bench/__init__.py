"""`python -m quad_modifiers.bench`: measurements of what the documentation claims."""
