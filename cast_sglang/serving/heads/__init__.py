"""Draft heads that propose all layers of a tree in one pass: model classes for SGLang."""
