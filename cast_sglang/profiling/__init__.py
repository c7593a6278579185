"""Measuring a cost profile: which shapes, how often, in which order, until which precision."""
