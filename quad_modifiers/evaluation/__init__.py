"""Measure a model: perplexity over token windows."""

from quad_modifiers.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
