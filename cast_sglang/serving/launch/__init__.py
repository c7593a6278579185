"""Before a server runs: its arguments, what a profile must match, and `cast-sglang doctor`."""
