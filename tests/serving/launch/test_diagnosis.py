"""The report of `cast-sglang doctor`, for people and for programs."""

import json

import pytest
from rich.console import Console

from cast_sglang.serving.launch.diagnosis import Check, Diagnosis


def test_report_for_people(capsys):
    checks = [
        Check("device", "ok", "a [bold] name"),
        Check("profile", "warn", "none found", "run " + "x" * 300),
        Check("pair", "fail", "does not fit"),
    ]
    Diagnosis(checks).print(Console())
    assert capsys.readouterr().out.splitlines() == [
        "ok    device   a [bold] name",
        "warn  profile  none found",
        " " * 15 + "-> run " + "x" * 300,
        "fail  pair     does not fit",
        "1 failed, 1 to look at",
    ]


@pytest.mark.parametrize(
    ("statuses", "last", "code"),
    [
        (["ok", "ok"], "everything fits", 0),
        (["skip", "ok", "skip"], "2 not checked", 0),
        (["warn", "skip"], "1 to look at, 1 not checked", 0),
        (["skip", "fail", "fail", "warn"], "2 failed, 1 to look at, 1 not checked", 1),
    ],
)
def test_only_a_failure_is_an_error(statuses, last, code, capsys):
    diagnosis = Diagnosis([Check("device", status, "") for status in statuses])
    diagnosis.print(Console())
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert diagnosis.exit_code == code
    assert json.loads(diagnosis.as_json())["ok"] == (code == 0)


def test_report_for_programs():
    checks = [
        Check("device", "ok", 'a "quoted" name'),
        Check("profile", "warn", "none found", "measure one"),
    ]
    text = Diagnosis(checks).as_json()
    assert "\n" not in text
    assert json.loads(text)["checks"] == [
        {"name": "device", "status": "ok", "found": 'a "quoted" name', "fix": ""},
        {"name": "profile", "status": "warn", "found": "none found", "fix": "measure one"},
    ]
