"""4-bit entries of a key/value cache: one asymmetric grid per token and head."""
