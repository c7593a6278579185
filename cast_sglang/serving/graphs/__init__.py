"""CUDA graphs of verify and draft extend: which sizes are captured, and their runners."""
