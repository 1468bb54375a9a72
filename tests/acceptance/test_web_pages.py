"""A page in a real Chromium calls the bridge from another origin, and listens; one of an origin not named cannot."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any, Self

import pytest

from flowbridge.cli.demo.synapse import Account, LocalSynapse
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.acceptance.test_nodes import browser as browser
from tests.conftest import MakeRoom
from tests.patience import PATIENCE

KEY = "fb_key-of-32-characters-and-some-more"
PAGE = """<!doctype html><script type="module">
const bridge = %(bridge)s, room = %(room)s, key = %(key)s;
const told = {};
async function attempt(name, work) {
  try { told[name] = await work(); } catch (error) { told[name] = `${error.name}: ${error.message}`; }
}
await attempt("sent", async () => {
  const headers = {"X-API-Key": key, "Idempotency-Key": crypto.randomUUID(), "Content-Type": "application/json"};
  const body = '{"payload": "hi"}';
  const answer = await fetch(`${bridge}${room}/send/m.room.message`, {method: "POST", headers, body});
  return {status: answer.status, delivery: Boolean(answer.headers.get("Flowbridge-Delivery"))};
});
await attempt("refused", async () => {
  const answer = await fetch(`${bridge}/whoami`, {headers: {"X-API-Key": "fb_wrong"}});
  return {status: answer.status, errcode: (await answer.json()).errcode};
});
await attempt("heard", () => new Promise((resolve, reject) => {
  const source = new EventSource(`${bridge}${room}/live?types=m.room.message&access_token=${key}`);
  source.onerror = () => { source.close(); reject(new Error("no stream")); };
  const send = `${bridge}${room}/send/m.room.message?access_token=${key}`;
  source.onopen = () => fetch(send, {method: "POST", body: "heard"});
  source.onmessage = (message) => { source.close(); resolve(JSON.parse(message.data).content.body); };
}));
await fetch("/told", {method: "POST", body: JSON.stringify(told)});
</script>"""


class Site:
    """A web server with one page, which tells it how it fared."""

    def __init__(self) -> None:
        self.page = ""
        self.told: Queue[dict[str, Any]] = Queue()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(site.page.encode())

            def do_POST(self) -> None:
                site.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the standard library's name)
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def opened(browser: str, url: str, folder: Path) -> Iterator[None]:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen([*command, url], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.parametrize(
    ("host", "fares"),
    [
        (
            "localhost",
            {
                "sent": {"status": 200, "delivery": True},
                "refused": {"status": 401, "errcode": "M_UNKNOWN_TOKEN"},
                "heard": "heard",
            },
        ),
        (
            "127.0.0.1",
            {
                "sent": "TypeError: Failed to fetch",
                "refused": "TypeError: Failed to fetch",
                "heard": "Error: no stream",
            },
        ),
    ],
)
def test_page_of_a_named_origin_sends_reads_errors_and_listens_and_another_cannot(
    host: str,
    fares: dict[str, Any],
    browser: str,
    synapse: LocalSynapse,
    bot: Account,
    make_room: MakeRoom,
    tmp_path: Path,
) -> None:
    with Site() as site:
        settings = Settings.load(
            base_url=synapse.url,
            access_token=bot.access_token,
            api_keys=KEY,
            cors_origins=f"http://localhost:{site.port}",
            database_url=f"sqlite:///{tmp_path}/flowbridge.db",
        )
        with background(settings) as url:
            values = {"bridge": url, "room": f"/rooms/{make_room(bot)}", "key": KEY}
            site.page = PAGE % {name: json.dumps(value) for name, value in values.items()}
            with opened(browser, f"http://{host}:{site.port}/", tmp_path):
                assert site.told.get(timeout=2 * PATIENCE) == fares
