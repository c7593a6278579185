"""Measuring a cost profile on an idle engine, by `cast-sglang profile` or at the first start."""
