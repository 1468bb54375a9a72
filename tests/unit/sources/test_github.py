"""All that GitHub sends: the examples that its users have recorded, of github.com and five versions of its server."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import node
from tests.unit.sources.test_code_hosts import github

FOLDER = Path(__file__).parents[2] / "clients" / "octokit"
MAX_SECONDS = 0.05
_CODE_WORDS = re.compile(r"\b(None|null|undefined|NaN|nan)\b|\{\}|\[\]|\[object|\{\{|<Undefined")


@pytest.fixture(scope="module")
def examples() -> dict[str, list[tuple[str, Any]]]:
    """Events and their bodies, by where they are from."""
    node.installed(FOLDER, "the examples of what GitHub sends")
    package = FOLDER / "node_modules" / "@octokit" / "webhooks-examples"
    return {file.parent.name: list(_read(file)) for file in sorted(package.glob("*/index.json"))}


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    for event in json.loads(file.read_text()):
        for payload in event["examples"]:
            yield event["name"], payload


def test_all_of_them_are_here(examples: dict[str, list[tuple[str, Any]]]) -> None:
    assert {name: len(found) for name, found in examples.items()} == {
        "api.github.com": 329,
        "ghes-31": 49,
        "ghes-32": 49,
        "ghes-33": 50,
        "ghes-34": 124,
        "ghes-35": 125,
    }


def test_each_is_shown_in_words_and_fast(examples: dict[str, list[tuple[str, Any]]]) -> None:
    """Those that are quiet, too, where a hook wants them."""
    for event, payload in (each for found in examples.values() for each in found):
        body = json.dumps(payload)
        begun = time.process_time()
        found = github(event, body, ignore=(f"+{event}",))
        took = time.process_time() - begun
        where = f"{event}.{payload.get('action')}: {found}"
        assert (found["source"], found["warnings"]) == ("github", []), where
        assert found["event"].partition(".")[0] == event, where
        assert took < MAX_SECONDS, where
        if event == "ping":
            assert found["nothing"] == "a ping: the hook works"
            continue
        (message,) = found["messages"]
        text = message["body"]
        assert len(text.split()) >= 3, where
        assert not _CODE_WORDS.search(text), where
        assert not _CODE_WORDS.search(message["html"]), where
        assert "(unnamed)" not in text, where
        assert "(untitled)" not in text, where
        assert bool(message["state"]) == bool(message["key"]), where
        assert bool(message["firing"]) == (message["state"] == "firing"), where


_LINKED = {  # event → the object that its message leads to
    **{
        name: name for name in ("discussion", "installation", "milestone", "project", "pull_request", "release", "team")
    },
    **{name: name for name in ("check_run", "repository", "workflow_job", "workflow_run")},
    **{f"{name}_alert": "alert" for name in ("code_scanning", "dependabot")},
    **{f"{name}_comment": "comment" for name in ("commit", "discussion", "issue", "pull_request_review")},
    "fork": "forkee",
    "issues": "issue",
    "pull_request_review": "review",
}


def test_each_says_where_and_leads_there(examples: dict[str, list[tuple[str, Any]]]) -> None:
    for event, payload in (each for found in examples.values() for each in found):
        if event == "ping":
            continue
        (message,) = github(event, payload, ignore=(f"+{event}",))["messages"]
        if repository := payload.get("repository"):
            assert message["body"].split("\n")[0].find(f"{repository['full_name']}: ") in (0, 2, 3), message["body"]
        link = payload[_LINKED[event]].get("html_url", "") if event in _LINKED else ""
        if payload.get("action") not in ("deleted", "answered"):
            assert link in message["html"], message["html"]


def test_what_is_quiet_is_documented(examples: dict[str, list[tuple[str, Any]]]) -> None:
    quiet = {
        found["event"]
        for event, payload in (each for found in examples.values() for each in found)
        if not (found := github(event, payload))["messages"] and event != "ping"
    }
    assert len(quiet) > 50
    documented = (Path(__file__).parents[3] / "docs" / "hooks.md").read_text()
    for event in quiet:
        name, _, action = event.partition(".")
        assert f"`{event}`" in documented or f"`.{action}`" in documented or f"`{name}`" in documented, event
