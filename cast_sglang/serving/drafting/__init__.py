"""Drafting a tree on the draft model: layers, their graphs and attention, and the worker."""
