"""Entries of a key/value cache in 4 or 8 bits: one asymmetric grid per token and head."""
