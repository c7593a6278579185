"""What a package index and an installer are told: links that lead somewhere, and one SGLang."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cast_sglang.serving.launch import host_contract

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_an_index_is_told_who_what_and_where(project):
    assert project["authors"] and project["description"] and project["keywords"]
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert {name.partition(" :: ")[0] for name in project["classifiers"]} >= {
        *("Development Status", "Environment", "Operating System", "Programming Language"),
    }


def test_the_text_of_an_index_has_no_links_into_a_checkout(project):
    text = project["readme"]["text"]
    links = re.findall(r"\]\(([^)\s]+)\)", text.replace("\n", " "))
    assert links and all(link.startswith("https://") for link in links)


def test_the_sglang_that_is_asked_for_is_the_one_that_was_tested(project):
    [asked] = [line for line in project["dependencies"] if re.match(r"sglang\b", line)]
    version = asked.removeprefix("sglang==")
    assert version == metadata.version("sglang")
    assert f"sglang=={version}\n" in (ROOT / "constraints.txt").read_text()
    contract = Path(host_contract.__file__).with_name("host_contract.txt")
    assert f"of SGLang {version}, with signatures" in contract.read_text()
    for text in (project["readme"]["text"], (ROOT / "README.md").read_text()):
        assert set(re.findall(r"SGLang (\d[\d.]*\d)", text)) == {version}
