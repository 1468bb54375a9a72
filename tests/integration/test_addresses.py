"""`BASE_URL` in its forms that need somebody to ask: .well-known over TLS, and S3."""

import asyncio
import json
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.server import ThreadedMotoServer

from flowbridge.cli.demo.synapse import LocalSynapse
from flowbridge.homeserver import AddressError, AddressUnknown, Locator, tls_context
from flowbridge.settings import Settings
from flowbridge.web.server import background
from tests.conftest import MakeAccount, MakeRoom
from tests.integration.conftest import store_in


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


@contextmanager
def https_server(certificate: Path, status: int, body: bytes, location: str = "") -> Iterator[str]:
    """A host that answers every GET with this; gives `localhost:port`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the standard library's name)
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


def _ask(base_url: str, certificate: Path | None = None) -> str:
    return str(asyncio.run(Locator(base_url, tls_context(certificate)).address()))


def test_bare_host_is_asked_for_its_well_known(
    certificate: Path, synapse: LocalSynapse, make_account: MakeAccount, make_room: MakeRoom, tmp_path: Path
) -> None:
    account = make_account()
    announced = json.dumps({"m.homeserver": {"base_url": f"{synapse.url}/"}}).encode()
    with https_server(certificate, 200, announced) as host:
        settings = Settings.load(base_url=host, ca_file=certificate, database_url=store_in(tmp_path))
        with background(settings) as url, httpx.Client(base_url=url, trust_env=False) as client:
            answer = client.post(
                f"/rooms/{make_room(account)}/send/m.room.message",
                json="found",
                headers={"Authorization": f"Bearer {account.access_token}"},
            )
    assert answer.status_code == 200, answer.text


def test_host_without_a_well_known_is_the_homeserver_itself(certificate: Path) -> None:
    with https_server(certificate, 404, b"") as host:
        assert _ask(host, certificate) == f"https://{host}"


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, b"", "answers 500"),
        (302, b"", "answers 302"),
        (200, b"<html>", "announces no m.homeserver.base_url"),
        (200, b'{"m.homeserver": {"base_url": 7}}', "announces no m.homeserver.base_url"),
        (200, b'{"m.homeserver": {"base_url": "ftp://x"}}', "neither https:// nor http://"),
        (200, b'{"m.homeserver": {"base_url": "http://matrix.example.org"}}', "clear text"),
        (200, b"x" * 70_000, "more than 65536 bytes"),
    ],
)
def test_well_known_that_is_of_no_use(certificate: Path, status: int, body: bytes, says: str) -> None:
    served = https_server(certificate, status, body, "https://elsewhere.invalid/")
    with served as host, pytest.raises(AddressUnknown, match=says):
        _ask(host, certificate)


def test_certificate_of_an_unknown_authority_is_refused(certificate: Path) -> None:
    with https_server(certificate, 404, b"") as host, pytest.raises(AddressUnknown, match=r"(?i)certificate"):
        _ask(host)


@pytest.fixture
def put_object(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A real S3 API on loopback: writes the object s3://settings/homeserver."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="settings")

    def put(text: str) -> None:
        client.put_object(Bucket="settings", Key="homeserver", Body=text.encode())

    yield put
    client.close()
    server.stop()


def test_s3_object_holds_the_address_and_a_refresh_reads_it_again(put_object: Callable[[str], None]) -> None:
    put_object(" http://127.0.0.1:8008\n")

    async def moves() -> tuple[str, str]:
        locator = Locator("s3://settings/homeserver", tls_context(None))
        before = str(await locator.address())
        put_object("https://matrix.example.org")
        await locator.refresh()
        return before, str(await locator.address())

    assert asyncio.run(moves()) == ("http://127.0.0.1:8008", "https://matrix.example.org")


def test_s3_object_that_is_not_there_is_an_error_to_mend(put_object: Callable[[str], None]) -> None:
    with pytest.raises(AddressError, match=r"s3://settings/nothing: .*NoSuchKey"):
        _ask("s3://settings/nothing")


def test_s3_object_that_holds_rubbish_is_an_error_to_mend(put_object: Callable[[str], None]) -> None:
    put_object("not an address")
    with pytest.raises(AddressError, match="s3://settings/homeserver holds a wrong address"):
        _ask("s3://settings/homeserver")


def test_s3_out_of_reach_may_come_back(put_object: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(AddressUnknown, match="Could not connect"):
        _ask("s3://settings/homeserver")
