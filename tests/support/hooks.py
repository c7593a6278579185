"""What the plugin hooks in SGLang."""

import importlib


class Registry:
    """SGLang's registry of hooks, which applies none."""

    def __init__(self):
        self.hooks = {}

    def register(self, target, hook, kind):
        assert target not in self.hooks
        self.hooks[target] = hook, kind


def collect_hooks(monkeypatch, *modules) -> dict[str, tuple]:
    """Keep these modules from registering hooks; return those that they register, by target."""
    registry = Registry()
    for module in modules:
        monkeypatch.setattr(module, "HookRegistry", registry)
    return registry.hooks


def hooked(target):
    """Return what a hook's target names."""
    parts = target.split(".")
    end = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
    found = importlib.import_module(".".join(parts[:end]))
    for name in parts[end:]:
        found = getattr(found, name)
    return found
