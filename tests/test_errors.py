"""The errors: one family, told apart as the command line and callers need, one line each."""

import ast
from pathlib import Path

import pytest

import cast_sglang
from cast_sglang import errors

FILES = sorted(Path(cast_sglang.__file__).parent.rglob("*.py"))


def raised(path):
    """Yield the name and the message parts of each error of the family that a file makes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in errors.__all__ and node.args:
                constants = (
                    part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)
                )
                yield (
                    node.func.id,
                    [part.value for part in constants if isinstance(part.value, str)],
                )


def test_every_error_is_a_cast_error():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.CastError)


def test_bad_input_is_a_value_error_and_a_host_that_cannot_is_none():
    kinds = {
        "ConfigError": ValueError,
        "ProfileError": ValueError,
        "TraceError": ValueError,
        "HostError": RuntimeError,
    }
    for name, kind in kinds.items():
        with pytest.raises(kind, match="the reason"):
            raise getattr(errors, name)("the reason")
        assert not any(
            issubclass(getattr(errors, name), getattr(errors, o)) for o in {*kinds} - {name}
        )
    assert not issubclass(errors.HostError, ValueError)


def test_a_missing_profile_is_told_from_a_damaged_one():
    """A first start measures where there is none, and must not hide one that is damaged."""
    assert issubclass(errors.MissingProfileError, errors.ProfileError)
    with pytest.raises(errors.ProfileError) as caught:
        raise errors.ProfileError("damaged")
    assert not isinstance(caught.value, errors.MissingProfileError)


def test_the_list_in_the_module_is_the_family():
    listed = {
        line.split("── ")[-1].split()[0]
        for line in errors.__doc__.splitlines()
        if line.startswith("    ")
    }
    assert listed == set(errors.__all__)


def test_every_error_is_in_use_and_its_messages_are_one_line():
    used = set()
    for path in FILES:
        for name, parts in raised(path):
            used.add(name)
            text = "".join(parts)
            assert "\n" not in text and not text.endswith("."), f"{path.name}: {text}"
    assert used == {*errors.__all__} - {"CastError"}
