"""CUDA graphs of verify and draft extend: the plan of sizes, and their runners."""
