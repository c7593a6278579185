"""Names under which SGLang knows the platform."""

__all__ = ["ATTENTION_BACKEND", "PLATFORM_NAME"]

PLATFORM_NAME = "cast_cpu"
ATTENTION_BACKEND = "cast_cpu"
