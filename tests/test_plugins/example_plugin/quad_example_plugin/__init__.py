"""An example plugin for QUAD Modifiers. It imports nothing, so that loading a checkpoint stays fast."""
