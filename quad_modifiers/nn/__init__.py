"""Modules of a QUAD model."""
