"""A method of its own for QUAD Modifiers. It imports nothing, so that loading a checkpoint stays fast."""
