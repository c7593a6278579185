"""The names by which SGLang refers to the platform and its attention backend."""

__all__ = ["ATTENTION_BACKEND", "PLATFORM_NAME"]

PLATFORM_NAME = "cast_cpu"
ATTENTION_BACKEND = "cast_cpu"
