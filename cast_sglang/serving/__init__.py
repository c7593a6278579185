"""The edge to SGLang: registration, worker and step. Imports sglang; nothing left of it does."""
