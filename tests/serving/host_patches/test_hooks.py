"""Hooks on SGLang: they exist where they are put, and leave servers of other algorithms alone."""

from types import SimpleNamespace

import pytest

from cast_sglang.serving.host_patches import hooks


@pytest.fixture
def algorithm(monkeypatch):
    """Return a function that sets the algorithm that this process serves with."""

    def serve_with(name):
        spec = SimpleNamespace(speculative_algorithm=name)
        monkeypatch.setattr(hooks, "get_spec", lambda: spec)

    return serve_with


def test_what_is_hooked_is_there(monkeypatch):
    import importlib

    targets = []
    registry = SimpleNamespace(register=lambda target, hook, kind: targets.append(target))
    monkeypatch.setattr(hooks, "HookRegistry", registry)
    hooks.register_hooks()
    assert len(targets) == len(set(targets)) >= 9
    for target in targets:
        parts = target.split(".")
        end = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
        found = importlib.import_module(".".join(parts[:end]))
        for name in parts[end:]:
            found = getattr(found, name)
        assert callable(found), target


def test_the_constructor_builds_our_draft_worker_and_no_other_does():
    from sglang.srt.speculative import eagle_worker_v2

    original = eagle_worker_v2.EagleDraftWorker
    with pytest.raises(RuntimeError), hooks.building_draft_worker(SimpleNamespace):
        assert eagle_worker_v2.EagleDraftWorker is SimpleNamespace
        raise RuntimeError
    assert eagle_worker_v2.EagleDraftWorker is original


def test_prompts_are_admitted_as_plain_decoding_admits_them(algorithm):
    for name, reserved in (("CAST", 0), ("EAGLE3", 7), (None, 7)):
        algorithm(name)
        assert hooks._reserve_no_context(lambda: 7) == reserved


def test_weight_updates_of_all_go_to_the_target_alone(algorithm):
    def original(manager, selector):
        return [(selector, manager)]

    for name, selected in (("CAST", "target"), ("EAGLE3", "all")):
        algorithm(name)
        assert hooks._select_runners(original, "manager") == [(selected, "manager")]
        assert hooks._select_runners(original, "manager", "draft") == [("draft", "manager")]
