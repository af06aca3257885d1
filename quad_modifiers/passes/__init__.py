"""Passes over a decoder, one block at a time: statistics of activations, quantization of weights."""
