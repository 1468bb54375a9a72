"""openapi.json says what the bridge does: the file is fresh, it is OpenAPI, and the answers are as it says."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from schemathesis.checks import CheckFunction
from schemathesis.core.transport import Response
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.python._constants.orchestrator import make_constants_value_source
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

from flowbridge.models.timing import Timing
from flowbridge.settings import Settings
from flowbridge.web.app import create_app
from tests import upstream as scripted
from tests.http.conftest import KEY, running
from tests.patience import PATIENCE
from tests.upstream import Behaviour, Request, Upstream

FILE = Path(__file__).parents[2] / "openapi.json"
# hypothesis compares the state of `random` before and after it has made a value, and the bridge, in a thread of this
# process, uses it for the jitter of its pauses meanwhile.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

DOCUMENT = create_app(Settings.model_construct()).app.openapi()
EXAMPLES = 30  # per operation
SHORT = 0.02  # seconds that a send is waited for: it is often enough in time, and often not
QUICK = Timing(key_lookup_seconds=0.002)  # each unknown key or hook waits for a look
# What an operation promises whatever comes in. Not asked: that generated bodies are accepted or refused as the
# document alone would have it, because the event type in the path decides which schema holds (`anyOf` cannot say so).
STREAMS = ("live", "roomLive")  # their answers do not end: tests/integration/test_live.py has them
OPERATIONS = [
    (method.upper(), path)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if operation["operationId"] not in STREAMS
]
READS = [each for each in OPERATIONS if each[0] == "GET"]
WRITES = [each for each in OPERATIONS if each[0] != "GET"]
CHECKS: list[CheckFunction] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
]

# Systematic cases come first, then the examples, then random ones. For bodies the systematic ones are left out: the
# catalogue's fifty schemas make 4,000 of them for each of the twelve operations that send, four minutes in all.
api = schemathesis.openapi.from_dict(DOCUMENT)
reads = schemathesis.openapi.from_dict(DOCUMENT)
writes = schemathesis.openapi.from_dict(DOCUMENT)
writes.config.phases.coverage.enabled = False


def test_file_is_what_the_application_says() -> None:
    assert FILE.is_file(), "openapi.json is missing: run `make openapi`"
    assert json.loads(FILE.read_text(encoding="utf-8")) == DOCUMENT, "openapi.json is stale: run `make openapi`"


def test_document_is_valid_openapi() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    api.validate()


def test_every_reference_leads_somewhere() -> None:
    def references(value: object) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                yield reference
            yield from itertools.chain.from_iterable(references(item) for item in value.values())
        elif isinstance(value, list):
            yield from itertools.chain.from_iterable(references(item) for item in value)

    found = set(references(DOCUMENT))
    assert found
    for reference in found:
        node = DOCUMENT
        assert reference.startswith("#/"), reference
        for step in reference[2:].split("/"):
            assert step in node, reference
            node = node[step]


def test_every_example_is_valid() -> None:
    """Of schemas, parameters and bodies."""
    registry = Registry().with_resource("urn:openapi", DRAFT202012.create_resource(DOCUMENT))

    def examples(value: Any, at: str) -> Iterator[tuple[str, Any]]:
        """Pointers to schemas, and what is given as an example of them."""
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from examples(item, f"{at}/{index}")
        elif isinstance(value, dict):
            if isinstance(value.get("examples"), list):
                yield from ((at, example) for example in value["examples"])
            if "schema" in value:
                named = value.get("examples", {}) if isinstance(value.get("examples"), dict) else {}
                found = [each.get("$ref", "") for each in named.values()]
                shared = [DOCUMENT["components"]["examples"][name.rpartition("/")[2]] for name in found if name]
                yield from ((f"{at}/schema", each["value"]) for each in (*shared, *named.values()) if "value" in each)
                yield from ((f"{at}/schema", value["example"]) for _ in range("example" in value))
            for key, item in value.items():
                yield from examples(item, f"{at}/{key.replace('~', '~0').replace('/', '~1')}")

    number = 0
    for at, example in examples(DOCUMENT, ""):
        schema = {"$ref": f"urn:openapi#{quote(at)}"}
        Draft202012Validator(schema, registry=registry).validate(example)
        number += 1
    assert number > 100


def test_every_operation_has_a_name_and_its_errors() -> None:
    names = []
    for path in DOCUMENT["paths"].values():
        for operation in path.values():
            names.append(operation["operationId"])
            assert operation["summary"]
            assert {"404", "405"} <= operation["responses"].keys()
            assert {"200", "201", "202"} & operation["responses"].keys()
    assert len(names) == len(set(names))


def moody() -> scripted.Script:
    """A homeserver that every few requests has one of its own errors to tell, and otherwise does what is asked."""
    moods = itertools.cycle(
        [
            None,
            None,
            scripted.matrix_error(403, "M_FORBIDDEN", "You are not in the room"),
            None,
            scripted.matrix_error(404, "M_NOT_FOUND", "Event not found"),
            scripted.matrix_error(429, "M_LIMIT_EXCEEDED", "Too many requests", retry_after_ms=50),
            None,
            scripted.matrix_error(400, "M_UNKNOWN", "Cannot do this"),
            scripted.matrix_error(401, "M_UNKNOWN_TOKEN", "Unrecognised access token"),
        ]
    )

    def script(request: Request) -> Behaviour | None:
        return next(moods) if "/rooms/" in request.target else None

    return script


@pytest.fixture(scope="module")
def bridge_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("contract")
    with Upstream(moody()) as upstream, running(upstream, folder, wait_seconds=SHORT, timing=QUICK) as bridge:
        yield bridge.url


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False
        yield made


@pytest.fixture(scope="module")
def tokens() -> Iterator[dict[str, str]]:
    """In turn: a caller's token (twice), a key, none."""
    return itertools.cycle(
        [{"Authorization": "Bearer token"}, {"Authorization": "Bearer token"}, {"X-API-Key": KEY}, {}]
    )


bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def is_to_be_expected(response: Response) -> bool:
    """Whether it is one of the ways in which this upstream makes the bridge itself answer a 5xx."""
    refused = response.status_code == 502 and "own account" in response.text  # the upstream's 401, for a key
    unsettled = response.status_code == 504 and "the same txnId" in response.text
    # The upstream's 400 or 403 to the question whether the room is encrypted: the event waits, which Matrix has no
    # answer for. The 403 contradicts what the upstream says of the membership.
    says = ("nothing was sent: Cannot do this", "nothing was sent: You are not in the room")
    unasked = response.status_code == 502 and any(each in response.text for each in says)
    return refused or unsettled or unasked


def check(case: schemathesis.Case[Any], url: str, session: requests.Session, headers: dict[str, str]) -> None:
    response: Response = case.call(base_url=url, session=session, headers=headers, timeout=PATIENCE)
    assert response.status_code < 500 or is_to_be_expected(response), f"{response.status_code}: {response.text[:500]}"
    case.validate_response(response, checks=CHECKS)


def check_all(schema: OpenApiSchema, method: str, path: str, *given: Any) -> None:
    """All cases of an operation.

    schemathesis' own parametrize makes them when tests are collected, 4 s of the processor in each worker, and gives
    all operations one test id (4.32 with pytest 9.2): xdist then runs the first of them alone.
    """
    url, session, tokens = given

    def test(case: schemathesis.Case[Any]) -> None:
        check(case, url, session, next(tokens))

    build_operation_test(
        config=schema.config,
        operation=schema[path][method],
        test_func=bounded(test),
        given_kwargs={},
        feedback=FeedbackSources(constants_value_source=make_constants_value_source(schema)),
    )()


@pytest.mark.parametrize(("method", "path"), READS)
def test_reads_are_answered_as_documented(
    method: str, path: str, bridge_url: str, session: requests.Session, tokens: Iterator[dict[str, str]]
) -> None:
    check_all(reads, method, path, bridge_url, session, tokens)


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_writes_are_answered_as_documented(
    method: str, path: str, bridge_url: str, session: requests.Session, tokens: Iterator[dict[str, str]]
) -> None:
    check_all(writes, method, path, bridge_url, session, tokens)
