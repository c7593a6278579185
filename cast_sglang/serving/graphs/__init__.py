"""CUDA graphs of verify and draft extend, and the attention backends that they run on."""
