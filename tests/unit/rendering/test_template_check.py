"""flowbridge.rendering.template_check: what is wrong with a hook's template is known before it is kept."""

import json
from typing import Any

import pytest

from flowbridge import sources
from flowbridge.rendering import template_check


def check(template: dict[str, str], source: str = "auto") -> dict[str, Any]:
    text, html = template_check.check(source, {"template": template, "per": "notification"})
    assert html is None
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("source", sources.NAMES)
def test_template_for_any_request_is_right(source: str) -> None:
    assert check({"text": "{{ payload.title or event or 'news' }}", "title": "{{ source }}"}, source) == {
        "wrong": [],
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("{{ a", "unexpected end of input, expected end of variable block (line 1)"),
        ("a\nb\n{% if %}", "unexpected end of block (line 3)"),
        ("{{ payload|nope }}", "filter nope is unknown (line 1)"),
        ("{{ nope() }}", "nope is unknown (line 1)"),
        ("{% if payload is nope %}{% endif %}", "test nope is unknown (line 1)"),
        ("{% include 'other' %}", ""),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "takes too many steps"),
    ],
)
def test_what_is_wrong_with_any_request_is_told(text: str, wrong: str) -> None:
    found = check({"title": "fine", "text": text})["wrong"]
    assert [member for member, _ in found] == ["text"]
    assert wrong in found[0][1]
    assert "\n" not in found[0][1]


def test_each_member_is_checked() -> None:
    assert [member for member, _ in check({"text": "{{ a", "title": "{{ b"})["wrong"]] == ["text", "title"]


def test_what_depends_on_the_request_is_wrong_only_for_a_source_that_has_a_sample() -> None:
    """An empty request is not what a sender sends."""
    text = "{{ payload.total / payload.number }}"
    assert check({"text": text}, "auto")["wrong"] == []
    assert check({"text": "{{ payload.x() }}"}, "auto")["wrong"] == []
    ((member, wrong),) = check({"text": "{{ payload.alerts / 2 }}"}, "alertmanager")["wrong"]
    assert member == "text"
    assert "(line 1)" in wrong


def test_template_that_says_nothing_of_a_sample_is_a_warning() -> None:
    found = check({"text": "{% if payload.nothing %}x{% endif %}"}, "alertmanager")
    assert found["wrong"] == []
    assert found["warnings"] == ["of a request as alertmanager sends them it makes no text: a summary would be sent"]


def test_template_that_changes_what_it_is_given_changes_no_sample() -> None:
    before = json.dumps(sources.BY_NAME["alertmanager"].sample)
    assert check({"text": "{{ payload.alerts.pop().status }}"}, "alertmanager") == {"wrong": [], "warnings": []}
    assert json.dumps(sources.BY_NAME["alertmanager"].sample) == before
