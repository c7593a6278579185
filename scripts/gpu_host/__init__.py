"""Checking CAST on a GPU host without a network: what it must be given, and what is run there."""
