"""flowbridge.hooks.definition: any JSON is a hook, or has problems."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.errors import BadContent, Problem
from flowbridge.hooks import definition
from flowbridge.models.hooks import SCHEMES, Hook, Verification
from flowbridge.store import hooks

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
VERIFICATION = st.dictionaries(st.sampled_from(definition.VERIFICATION_KEYS), JSON) | JSON
TEMPLATE = st.dictionaries(st.sampled_from(definition.MEMBERS), JSON) | JSON
KNOWN = {"verification": VERIFICATION, "template": TEMPLATE}


@given(st.fixed_dictionaries({}, optional={key: KNOWN.get(key, JSON) for key in definition.KEYS}) | JSON, st.booleans())
def test_any_json_is_a_hook_or_has_problems(value: Any, fixed: bool) -> None:
    problems: Sequence[Problem] = ()
    found = None
    try:
        found = definition.read(value, fixed=fixed)
    except BadContent as error:
        problems = error.problems
    assert (found is None) is (0 < len(problems) <= 100)
    assert all(problem.schema == "hook" for problem in problems)
    assert found is None or definition.NAME.fullmatch(found.hook.name)


@pytest.mark.parametrize(
    "hook",
    [
        Hook("ci", "!room:hs"),
        Hook("ci", "@alice:hs", keep_requests=0, per="alerts", mentions="never", ignore=("a", "b")),
        Hook("a.b_c-1", "#100%:hs", template={"html": "<b>{{ payload }}</b>", "title": "t"}, mention=("@room",)),
        Hook("ci", "!r:hs", verification=Verification("hmac", "X-Own", "v1=", "base64", "X-Time")),
        Hook("ci", "!r:hs", verification=Verification("grafana", timestamp_header="X-Time")),
        *(Hook("ci", "!r:hs", verification=Verification(scheme)) for scheme in SCHEMES if scheme != "hmac"),
    ],
)
def test_what_is_shown_of_a_hook_makes_the_same_hook(hook: Hook) -> None:
    assert definition.read(definition.to_json(hook)).hook == hook


def test_definition_of_every_scheme_is_kept_without_a_secret() -> None:
    for scheme in SCHEMES:
        own = {"header": "X-Own"} if scheme == "hmac" else {}
        secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" if scheme == "standard-webhooks" else "s" * 16
        read = definition.read(
            {"name": "ci", "room": "!r:hs", "verification": {"scheme": scheme, "secret": secret, **own}}
        )
        assert read.secrets == (secret,)
        assert secret not in hooks.definition(read.hook)
        assert secret not in str(definition.to_json(read.hook))


def test_two_secrets_are_for_the_file_alone() -> None:
    value = {"name": "ci", "room": "!r:hs", "verification": {"secret": ["a" * 16, "b" * 16]}}
    assert definition.read(value, fixed=True).secrets == ("a" * 16, "b" * 16)
    with pytest.raises(BadContent, match="/verification/secret"):
        definition.read(value)
