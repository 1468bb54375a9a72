"""A homeserver and a bridge in front of it, for tests in other languages: `python -m tests.world`.

It prints where everything is as one line of JSON, then obeys lines on stdin: `kill` (the bridge, with -9) and `start`
(the bridge again, on the same port and store), each answered with `{"done": …}`. It ends when stdin does.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from flowbridge.cli.demo.synapse import LocalSynapse
from tests.processes import free_port, serving_at

KEY = "fb_of-the-tests-of-32-characters-and-some-more"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LocalSynapse(rate_limits=False) as homeserver, ExitStack() as running:
        bot, friend = homeserver.register("bot"), homeserver.register("friend")
        settings = {
            "BASE_URL": homeserver.url,
            "ACCESS_TOKEN": bot.access_token,
            "FLOWBRIDGE_API_KEYS": KEY,
            "FLOWBRIDGE_FETCH_ALLOW": "127.0.0.1",
            "FLOWBRIDGE_DATABASE_URL": f"sqlite:///{folder}/flowbridge.db",
        }
        port, log = free_port(), Path(folder) / "log"

        def start() -> None:
            _, process = running.enter_context(serving_at(port, settings, log=log, installed=True))
            running.callback(process.kill)

        start()
        _say(
            homeserver=homeserver.url,
            bridge=f"http://127.0.0.1:{port}",
            bot=asdict(bot),
            friend=asdict(friend),
            key=KEY,
        )
        for line in sys.stdin:
            running.close()
            if line.strip() == "start":
                start()
            _say(done=line.strip())


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
