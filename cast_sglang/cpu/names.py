"""The names by which SGLang refers to the platform and its backends."""

__all__ = ["ATTENTION_BACKEND", "LORA_BACKEND", "PLATFORM_NAME"]

PLATFORM_NAME = "cast_cpu"
ATTENTION_BACKEND = "cast_cpu"
LORA_BACKEND = "torch_native"  # SGLang's, which needs no device
