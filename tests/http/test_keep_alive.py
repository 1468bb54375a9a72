"""Connections that are kept for the next request: for how long, and what the caller is told of it."""

import json
import subprocess

import pytest

from tests.http.conftest import HELLO, KEY, SEND, Bridge, Timed, post
from tests.node import PROGRAMS, environment
from tests.patience import PATIENCE

# Posts each `seconds` on an agent of its own: prints what went wrong, by how often.
FLOW = """
const http = require('http')
const [url, key, seconds, agents, posts, timeout] = process.argv.slice(1)
const body = JSON.stringify({msgtype: 'm.text', body: 'hello'})
const found = {}
const count = word => { found[word] = (found[word] || 0) + 1 }
const post = agent => new Promise(resolve => {
  const headers = {'X-API-Key': key, 'Content-Length': body.length}
  const request = http.request(url, {method: 'POST', agent, headers}, response => {
    response.resume()
    response.on('end', () => { count(response.statusCode); resolve() })
  })
  request.on('error', error => { count(error.code); resolve() })
  request.end(body)
})
const flow = async () => {
  const agent = new http.Agent(timeout ? {keepAlive: true, timeout: +timeout} : {keepAlive: true})
  for (let n = 0; n < posts; n++) {
    await post(agent)
    if (n + 1 < posts) await new Promise(resolve => setTimeout(resolve, seconds * 1000))
  }
  agent.destroy()
}
Promise.all(Array.from({length: +agents}, flow)).then(() => console.log(JSON.stringify(found)))
"""
AGENTS = 100


def posts_of_node(bridge: Bridge, *, seconds: float, posts: int, timeout: str = "") -> dict[str, int]:
    """What a hundred agents met, each of which posts so often; by status or error. `timeout`: the agents', in ms."""
    command = [str(PROGRAMS / "node"), "-e", FLOW, f"{bridge.url}{SEND}", KEY, str(seconds), str(AGENTS), str(posts)]
    done = subprocess.run([*command, timeout], env=environment(), capture_output=True, text=True, timeout=4 * PATIENCE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_node_that_posts_each_five_seconds_meets_no_closed_connection(bridge: Bridge) -> None:
    """uvicorn's 5 s, and Node's 5 s: one in twelve met a connection at its end, ECONNRESET."""
    assert posts_of_node(bridge, seconds=5.0, posts=2) == {"200": AGENTS * 2}
    assert len(bridge.upstream.events) == AGENTS * 2
    assert json.loads(bridge.upstream.events[0].body) == HELLO


def test_idle_connection_ends(timed: Timed) -> None:
    with timed(keep_alive_seconds=1).connect() as client:
        answer = client.send(post("/healthz", method="GET")).answer()
        assert answer.headers["keep-alive"] == "timeout=1"
        assert client.is_closed()


@pytest.mark.parametrize("target", ["/healthz", "/nothing", "/_matrix/client/versions", "/_matrix/client/v3/sync"])
def test_answer_says_for_how_long_the_connection_is_kept(bridge: Bridge, target: str) -> None:
    with bridge.connect() as client:
        for _ in range(2):
            answer = client.send(post(target, method="GET")).answer()
            assert answer.headers["keep-alive"] == "timeout=75"
            assert "connection" not in answer.headers
        answer = client.send(post(target, b"", "Connection: close", method="GET")).answer()
        assert answer.headers["connection"] == "close"
        assert "keep-alive" not in answer.headers
        assert client.is_closed()


@pytest.mark.parametrize(
    ("data", "before"),
    [
        pytest.param(post("/healthz", method="GET").replace(b"HTTP/1.1", b"HTTP/1.0"), 0, id="http-1.0"),
        pytest.param(b"garbage\r\n\r\n", 0, id="garbage"),
        pytest.param(post("/healthz", method="GET") + b"garbage\r\n\r\n", 1, id="garbage-behind-a-request"),
    ],
)
def test_last_answer_of_a_connection_does_not_say_that_it_is_kept(bridge: Bridge, data: bytes, before: int) -> None:
    with bridge.connect() as client:
        client.send(data)
        for _ in range(before):
            assert client.answer().headers["keep-alive"] == "timeout=75"
        answer = client.answer()
        assert answer.headers["connection"] == "close"
        assert "keep-alive" not in answer.headers


def test_agent_of_node_gives_a_connection_up_before_it_ends(timed: Timed) -> None:
    """One with a `timeout`, as the global one has: then it uses none in the last second that the answer promised."""
    bridge = timed(keep_alive_seconds=2)
    assert posts_of_node(bridge, seconds=2.0, posts=3, timeout="60000") == {"200": AGENTS * 3}


def test_connection_is_kept_when_the_body_comes_after_the_answer(timed: Timed) -> None:
    """A refusal need not wait for the body; what then came of it cost the connection, 20 s later."""
    bridge = timed(body_seconds=0.3)
    with bridge.connect() as client:
        for _ in range(2):
            client.send(post(SEND, b"{", "Authorization: Basic x", "Content-Length: 10"))
            assert client.answer().status == 401
            client.send(b"123456789")
            assert not client.is_closed(0.6)


def test_broken_body_of_an_answered_request_is_not_answered_again(bridge: Bridge) -> None:
    """The next request's answer would be taken for this."""
    with bridge.connect() as client:
        client.send(post(SEND, b"", "Authorization: Basic x", "Transfer-Encoding: chunked"))
        assert client.answer().status == 401
        client.send(b"no chunk\r\n")
        assert client.is_closed()
