"""nginx in two parts: a static "homeserver" that costs next to nothing, and the proxy that is the limit."""

import getpass
import http.client
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.servers import HOST, Command, Server, free_port

# Connections must outlive a run: at nginx's default of 1,000 requests each, clients meet closed ones.
COMMON = """
worker_processes 1;
daemon off;
pid nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
  access_log off;
  default_type application/json;
  keepalive_timeout 600s;
  keepalive_requests 100000000;
  client_body_buffer_size 128k;
  client_body_temp_path body;
  proxy_temp_path proxy;
  fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
"""

# What flowbridge, the hand-written bridge and matrix-webhook (matrix-nio) ask. A GET of state is a 404: the
# room is not encrypted. "$" starts a variable in nginx, hence the geo block.
HOMESERVER = """
  geo $dollar { default "$"; }
  server {
    listen HOST:PORT backlog=4096;
    location / { return 404 '{"errcode":"M_UNRECOGNIZED","error":"Not part of this benchmark"}'; }
    location ~ ^/_matrix/client/[^/]+/rooms/!stuck[^/]*/send/ { return 502; }
    location ~ ^/_matrix/client/[^/]+/rooms/[^/]+/(send|state)/ {
      if ($request_method = GET) { return 404 '{"errcode":"M_NOT_FOUND","error":"Event not found."}'; }
      return 200 '{"event_id":"${dollar}bWHlCnGyNUZdbyKPX6Iqmw5PsXrCyqsDGzrhlHe0Dwc"}';
    }
    location ~ ^/_matrix/client/[^/]+/(join/[^/]+|rooms/[^/]+/join|directory/room/[^/]+)$ {
      return 200 '{"room_id":"!room:example.org","servers":["example.org"]}';
    }
    location ~ ^/_matrix/client/(.+/)?versions$ {
      return 200 '{"versions":["r0.6.1","v1.1","v1.11","v1.15"]}';
    }
    location ~ /account/whoami$ { return 200 '{"user_id":"@bench:example.org","device_id":"BENCH"}'; }
    location ~ /joined_rooms$ { return 200 '{"joined_rooms":["!room:example.org"]}'; }
    location ~ /sync$ { return 200 '{"next_batch":"s1"}'; }
    location ~ /login$ {
      if ($request_method = GET) { return 200 '{"flows":[{"type":"m.login.password"}]}'; }
      return 200 '{"user_id":"@bench:example.org","access_token":"syt_bench","device_id":"BENCH"}';
    }
    location = /status { stub_status; }
  }
}
"""

# Rooms whose names end in "-sealed" are encrypted; their only member is @reader:example.org, whose devices' keys are in
# files. A static file is not for POST: the error page is asked for by GET.
SEALED = r"""
    location ~ ^/_matrix/client/[^/]+/rooms/[^/]+-sealed[^/]*/state/m\.room\.encryption {
      return 200 '{"algorithm":"m.megolm.v1.aes-sha2","rotation_period_msgs":1000000}';
    }
    location ~ ^/_matrix/client/[^/]+/rooms/[^/]+/members$ {
      return 200 '{"chunk":[{"state_key":"@reader:example.org","content":{"membership":"join"}}]}';
    }
    location ~ /keys/(query|claim)$ { error_page 405 =200 /$1.json; return 405; }
    location ~ ^/(query|claim)\.json$ { internal; root FILES; }
    location ~ /keys/ { return 200 '{}'; }
    location ~ /sendToDevice/ { return 200 '{}'; }
    location ~ /account_data/ { return 404 '{"errcode":"M_NOT_FOUND","error":"There is none"}'; }
    location / {"""

PROXY = """
  upstream homeserver { server UPSTREAM; keepalive 64; keepalive_requests 100000000; }
  server {
    listen HOST:PORT backlog=4096;
    location / {
      proxy_pass http://homeserver/_matrix/client/v3/;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }
  }
}
"""


def executable() -> str | None:
    """Where nginx is; Debian keeps it off an ordinary user's PATH."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def homeserver(directory: Path) -> Command:
    """The static upstream."""
    return _command("homeserver", HOMESERVER, directory, ready="/_matrix/client/versions")


def wary_homeserver(directory: Path, black_hole: int) -> Command:
    """The same, but it does not know every token, and a sync from a `since` is not answered: `black_hole` is a port."""
    known = "location ~ /account/whoami$ {"
    wary = (
        f"{known} if ($http_authorization !~ benchmark) "
        """{ return 401 '{"errcode":"M_UNKNOWN_TOKEN","error":"Unknown token"}'; }"""
    )
    poll = "location ~ /sync$ {"
    held = f"{poll} if ($arg_since) {{ proxy_pass http://{HOST}:{black_hole}; }}"
    config = HOMESERVER.replace(known, wary).replace(poll, held)
    return _command("wary-homeserver", config, directory, ready="/_matrix/client/versions")


def sealing_homeserver(directory: Path, keys: Mapping[str, Any], claimed: Mapping[str, Any]) -> Command:
    """The same with encrypted rooms: what it answers to questions about devices, and for their one-time keys."""
    files = directory / "keys"
    files.mkdir()
    (files / "query.json").write_text(json.dumps(keys))
    (files / "claim.json").write_text(json.dumps(claimed))
    config = HOMESERVER.replace("    location / {", SEALED.replace("FILES", str(files)), 1)
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""  # root's workers are nobody, who may not read
    return _command("sealing-homeserver", config, directory, ready="/_matrix/client/versions", main=user)


def proxy(upstream: Server, directory: Path) -> Command:
    """The reverse proxy in front of the upstream: `/rooms/…` becomes `/_matrix/client/v3/rooms/…`."""
    config = PROXY.replace("UPSTREAM", f"{HOST}:{upstream.port}")
    return _command("nginx", config, directory, ready="/versions")


def requests_served(upstream: Server) -> int:
    """How many requests the static upstream has had: a peer's answer without a call to it would be a lie."""
    connection = http.client.HTTPConnection(HOST, upstream.port, timeout=5)
    connection.request("GET", "/status")
    counters = re.findall(r"\d+", connection.getresponse().read().decode())
    connection.close()
    return int(counters[3])  # active connections, then accepted, handled, requests


def _command(name: str, http_part: str, directory: Path, ready: str, main: str = "") -> Command:
    port = free_port()
    config = directory / f"{name}-{port}.conf"
    config.write_text((main + COMMON + http_part).replace("HOST:PORT", f"{HOST}:{port}"))
    program = executable() or "nginx"
    argv = [program, "-e", "stderr", "-p", str(directory / f"{name}-{port}"), "-c", str(config)]
    return Command(name, argv, port, ready)
