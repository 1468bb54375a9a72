"""flowbridge.settings: where settings come from, and what a wrong one says."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from flowbridge import settings as settings_module
from flowbridge.settings import Settings, SettingsError, is_token

SECRET = "s3cr3t-canary-of-32-characters-and-more"
A, B, C, D = (f"fb_{letter}{'-' * 31}" for letter in "abcd")
VALUES = {
    "BASE_URL": ("base_url", "https://hs.example.org", "https://hs.example.org"),
    "ACCESS_TOKEN": ("access_token", "syt_x", SecretStr("syt_x")),
    "FLOWBRIDGE_API_KEYS": ("api_keys", A, (SecretStr(A),)),
    "FLOWBRIDGE_ALLOW_HTTP": ("allow_http", "1", True),
    "FLOWBRIDGE_REGISTRATION": ("registration", "off", False),
    "FLOWBRIDGE_PASS_FEDERATION": ("pass_federation", "OFF", False),
    "FLOWBRIDGE_SCHEMAS_DIR": ("schemas_dir", "/srv/schemas", Path("/srv/schemas")),
    "FLOWBRIDGE_HOOKS_FILE": ("hooks_file", "/etc/hooks.yaml", Path("/etc/hooks.yaml")),
    "FLOWBRIDGE_DATABASE_URL": ("database_url", "sqlite:////srv/x.db", SecretStr("sqlite:////srv/x.db")),
    "FLOWBRIDGE_SECRET_KEY": ("secret_key", "c2VjcmV0", SecretStr("c2VjcmV0")),
    "FLOWBRIDGE_ENCRYPTED_ROOMS": ("encrypted_rooms", "Allow", "allow"),
    "FLOWBRIDGE_AUTO_JOIN": (
        "auto_join",
        "OWN, @alice:partner.example hs.example:8448",
        ("own", "@alice:partner.example", "hs.example:8448"),
    ),
    "FLOWBRIDGE_VERIFY_USERS": (
        "verify_users",
        "@alice:partner.example, @b:hs.example:8448",
        ("@alice:partner.example", "@b:hs.example:8448"),
    ),
    "FLOWBRIDGE_WAIT_SECONDS": ("wait_seconds", "2.5", 2.5),
    "FLOWBRIDGE_REQUEST_SECONDS": ("request_seconds", "5", 5.0),
    "FLOWBRIDGE_LEASE_SECONDS": ("lease_seconds", "60", 60.0),
    "FLOWBRIDGE_REUSED_TXN_ID": ("reused_txn_id", "REPLAY", "replay"),
    "FLOWBRIDGE_MAX_QUEUED": ("max_queued", "3", 3),
    "FLOWBRIDGE_MAX_QUEUED_PER_ROOM": ("max_queued_per_room", "2", 2),
    "FLOWBRIDGE_MAX_DATABASE_BYTES": ("max_database_bytes", "1000000", 1_000_000),
    "FLOWBRIDGE_MIN_FREE_DISK_BYTES": ("min_free_disk_bytes", "0", 0),
    "FLOWBRIDGE_MAX_WAITING": ("max_waiting", "10", 10),
    "FLOWBRIDGE_MAX_FILE_BYTES": ("max_file_bytes", "1000000", 1_000_000),
    "FLOWBRIDGE_FETCH_ALLOW": (
        "fetch_allow",
        "files.lan, 10.0.0.0/8 ::1",
        ("files.lan", "10.0.0.0/8", "::1"),
    ),
    "FLOWBRIDGE_MAX_SHARE": ("max_share", "0.25", 0.25),
    "FLOWBRIDGE_PUBLIC_URL": (
        "public_url",
        "https://bridge.example:8443/matrix/",
        "https://bridge.example:8443/matrix",
    ),
    "FLOWBRIDGE_WRONG_KEYS_PER_MINUTE": ("wrong_keys_per_minute", "5", 5),
    "FLOWBRIDGE_KEEP_QUEUED_DAYS": ("keep_queued_days", "1.5", 1.5),
    "FLOWBRIDGE_MAX_SENT": ("max_sent", "0", 0),
    "FLOWBRIDGE_KEEP_SENT_DAYS": ("keep_sent_days", "0.5", 0.5),
    "FLOWBRIDGE_KEEP_SENT_HOURS": ("keep_sent_hours", "0.5", 0.5),
    "FLOWBRIDGE_KEEP_CONTENT_DAYS": ("keep_content_days", "0", 0.0),
    "FLOWBRIDGE_KEEP_CONTENTS": ("keep_contents", "Plain", "plain"),
    "FLOWBRIDGE_KEEP_DEAD_DAYS": ("keep_dead_days", "7", 7.0),
    "FLOWBRIDGE_TRUSTED_PROXIES": (
        "trusted_proxies",
        "127.0.0.1, 10.0.0.0/8 2001:db8::/32",
        (ip_network("127.0.0.1"), ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
    ),
    "FLOWBRIDGE_PROXY": ("proxy", f"http://bot:{SECRET}@proxy:3128", SecretStr(f"http://bot:{SECRET}@proxy:3128")),
    "FLOWBRIDGE_CORS_ORIGINS": (
        "cors_origins",
        "https://App.example.org:443, http://localhost:3000 capacitor://localhost",
        ("https://app.example.org", "http://localhost:3000", "capacitor://localhost"),
    ),
    "FLOWBRIDGE_OPERATIONS_PORT": ("operations_port", "9100", 9_100),
    "FLOWBRIDGE_LOG_FORMAT": ("log_format", "JSON", "json"),
    "FLOWBRIDGE_LOG_LEVEL": ("log_level", "Debug", "debug"),
}

pytestmark = pytest.mark.usefixtures("nothing_set")


def refused(**values: Any) -> str:
    """The one line that a wrong setting gives."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(**values)
    line = str(caught.value)
    assert "\n" not in line
    assert SECRET not in line
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None
    return line


def test_bridge_encrypts_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Settings.load().encrypted_rooms, Settings.load().is_to_encrypt) == ("encrypt", False)
    assert Settings.load(encrypted_rooms="encrypt").is_to_encrypt
    monkeypatch.setattr(settings_module, "find_spec", lambda _: None)
    assert (Settings.load().encrypted_rooms, Settings.load().is_to_encrypt) == ("refuse", False)
    assert "pip install 'flowbridge[e2ee]'" in refused(encrypted_rooms="encrypt")


def test_defaults_are_those_of_the_contract() -> None:
    settings = Settings.load()
    assert settings.model_dump() == {
        "base_url": "m.tekos.co",
        "set_aside_seconds": 300.0,
        "access_token": None,
        "user": None,
        "password": None,
        "api_keys": (),
        "allow_http": False,
        "ca_file": None,
        "proxy": None,
        "public_url": None,
        "database_url": SecretStr("sqlite:///flowbridge.db"),
        "secret_key": None,
        "encrypted_rooms": "encrypt",
        "schemas_dir": None,
        "hooks_file": None,
        "wait_seconds": 10.0,
        "request_seconds": 10.0,
        "lease_seconds": 30.0,
        "auto_join": ("own",),
        "verify_users": (),
        "registration": True,
        "pass_federation": True,
        "reused_txn_id": "send",
        "max_queued": 1_000_000,
        "max_queued_per_room": 100_000,
        "max_database_bytes": 1_073_741_824,
        "min_free_disk_bytes": 268_435_456,
        "max_waiting": 10_000,
        "wrong_keys_per_minute": 60,
        "max_share": 0.5,
        "keep_queued_days": 7.0,
        "max_sent": 1_000_000,
        "keep_sent_days": 30.0,
        "keep_sent_hours": None,
        "keep_content_days": None,
        "keep_contents": "all",
        "keep_dead_days": 30.0,
        "max_file_bytes": None,
        "max_hook_bytes": 1_048_576,
        "fetch_allow": (),
        "trusted_proxies": (),
        "cors_origins": (),
        "operations_port": None,
        "log_format": "text",
        "log_level": "info",
        "secret_files": {},
    }
    assert not settings.has_bot


@pytest.mark.parametrize("name", VALUES)
def test_setting_is_read_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field, text, value = VALUES[name]
    monkeypatch.setenv(name, text)
    assert getattr(Settings.load(), field) == value


@pytest.mark.parametrize("name", VALUES)
def test_setting_is_read_from_dotenv(name: str) -> None:
    field, text, value = VALUES[name]
    Path(".env").write_text(f"# a comment\nUNRELATED=1\n{name}={text}\n")
    assert getattr(Settings.load(), field) == value


@pytest.mark.parametrize("name", VALUES)
def test_empty_setting_counts_as_absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert Settings.load() == Settings()
    assert getattr(Settings.load(), VALUES[name][0]) == Settings.model_fields[VALUES[name][0]].get_default(
        call_default_factory=True, validated_data={}
    )


def test_environment_wins_over_dotenv_and_code_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("BASE_URL=from.dotenv\nACCESS_TOKEN=from_dotenv\n")
    monkeypatch.setenv("BASE_URL", "from.environment")
    assert Settings.load().base_url == "from.environment"
    settings = Settings.load(base_url="from.code", access_token="from_code")
    assert (settings.base_url, settings.access_token) == ("from.code", SecretStr("from_code"))


@pytest.mark.parametrize("name", ["user", "password", "base_url", "api_keys", "log_level", "access_token"])
def test_only_the_documented_names_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Settings.load()
    monkeypatch.setenv(name, "fb_something.of.another.program")
    Path(".env").write_text(f"{name}=fb_something.of.another.program\n")
    assert Settings.load() == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_dotenv_of_an_editor_with_a_byte_order_mark_is_read(encoding: str) -> None:
    Path(".env").write_text("FLOWBRIDGE_LOG_LEVEL=error\nBASE_URL=hs.example.org\n", encoding=encoding)
    settings = Settings.load()
    assert (settings.log_level, settings.base_url) == ("error", "hs.example.org")


def test_dotenv_that_is_not_utf8_is_one_line() -> None:
    Path(".env").write_bytes(b"ACCESS_TOKEN=" + SECRET.encode() + b"\xff\n")
    assert ".env" in refused()


@pytest.mark.parametrize(
    "text",
    [
        "proxy.example.org:3128",
        "http://proxy.example.org",
        "ftp://proxy.example.org:21",
        f"http://bot:{SECRET}@proxy:99999",
        f"http://bot:{SECRET}@proxy:3128/path",
        f"http://bot:{SECRET}@:3128",
        f"http://b%3Aot:{SECRET}@proxy:3128",
        f"http://bot:{SECRET}%0d%0a@proxy:3128",
    ],
)
def test_proxy_that_is_none_says_how_one_is_written(text: str) -> None:
    line = refused(proxy=text)
    assert line.startswith("FLOWBRIDGE_PROXY: ")
    assert line.endswith(
        "https://host:port or socks5://host:port, with user:password@ before the host if it wants them"
    )


@pytest.mark.parametrize("text", ["http://bot:%s@proxy:3128", "socks5://%s:secret@proxy:3128"])
def test_password_of_a_proxy_is_no_longer_than_can_be_sent(text: str) -> None:
    says = "FLOWBRIDGE_PROXY: the proxy's user and password have at most 255 bytes each"
    assert refused(proxy=text % ("%C3%BC" * 128)) == says


def test_socks_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda _: None)
    assert refused(proxy="socks5://proxy:1080") == (
        "FLOWBRIDGE_PROXY: a socks5 proxy needs the extra socks: pip install 'flowbridge[socks]'"
    )


@pytest.mark.parametrize(
    ("base_url", "variables", "found"),
    [
        ("hs.example.org", {"HTTPS_PROXY": "http://p:1"}, "HTTPS_PROXY"),
        ("https://hs.example.org", {"https_proxy": "http://p:1"}, "https_proxy"),
        ("s3://bucket/key", {"ALL_PROXY": "socks5://p:1"}, "ALL_PROXY"),
        ("https://hs.example.org", {"HTTP_PROXY": "http://p:1"}, ""),
        ("http://hs.internal:8008", {"HTTP_PROXY": "http://p:1"}, "HTTP_PROXY"),
        ("http://hs.internal:8008", {"HTTP_PROXY": "http://p:1", "NO_PROXY": ".internal"}, ""),
        ("https://hs.example.org", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, ""),
        ("https://hs.example.org", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example.org"}, "HTTPS_PROXY"),
        ("https://hs.example.org", {"HTTPS_PROXY": "http://p:1", "FLOWBRIDGE_PROXY": "http://p:1"}, ""),
        ("https://hs.example.org", {"HTTPS_PROXY": ""}, ""),
        ("http://127.0.0.1:8008", {"ALL_PROXY": "http://p:1"}, ""),
        ("http://[::1]:8008", {"ALL_PROXY": "http://p:1"}, ""),
    ],
)
def test_proxy_for_other_programs_is_noticed_where_it_would_count(
    base_url: str, variables: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Settings.load(base_url=base_url).unused_proxy == found


@pytest.mark.parametrize(
    "text",
    [
        "app.example.org",
        "https://app.example.org/",
        "https://app.example.org/app",
        "https://*.example.org",
        "https://app.example.org:port",
        "https://",
        "null",
        "https://ok.example.org, //app.example.org",
    ],
)
def test_origin_that_is_none_says_how_one_is_written(text: str) -> None:
    line = refused(cors_origins=text)
    assert line.startswith("FLOWBRIDGE_CORS_ORIGINS: '")
    assert line.endswith(" is no origin: https://app.example.org, without a path or a slash, or *")


# secrets


@pytest.mark.parametrize(
    ("name", "field", "others"),
    [
        ("ACCESS_TOKEN", "access_token", {}),
        ("FLOWBRIDGE_PASSWORD", "password", {"FLOWBRIDGE_USER": "bot"}),
        ("FLOWBRIDGE_API_KEYS", "api_keys", {}),
        ("FLOWBRIDGE_SECRET_KEY", "secret_key", {}),
        ("FLOWBRIDGE_DATABASE_URL", "database_url", {}),  # it may hold a password
    ],
)
@pytest.mark.parametrize("via_dotenv", [False, True])
def test_secret_is_read_from_a_file(
    name: str, field: str, others: dict[str, str], *, via_dotenv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("secret").write_text(f"{A}\n")
    for other, value in others.items():
        monkeypatch.setenv(other, value)
    if via_dotenv:
        Path(".env").write_text(f"{name}_FILE=secret\n")
    else:
        monkeypatch.setenv(f"{name}_FILE", "secret")
    found = getattr(Settings.load(), field)
    assert found == ((SecretStr(A),) if field == "api_keys" else SecretStr(A))


def test_api_keys_file_has_one_key_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("keys").write_text(f"{A}\n\n{B}\r\n{C}, {D}\n")
    monkeypatch.setenv("FLOWBRIDGE_API_KEYS_FILE", "keys")
    assert [key.get_secret_value() for key in Settings.load().api_keys] == [A, B, C, D]


@pytest.mark.parametrize("name", ["ACCESS_TOKEN", "FLOWBRIDGE_PASSWORD", "FLOWBRIDGE_API_KEYS"])
def test_missing_secret_file_is_named_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{name}_FILE", "/nowhere/token")
    assert refused().startswith(f"{name}_FILE: cannot read /nowhere/token: ")


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_secret_file_that_is_no_text_is_named(content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if content is None:
        Path("secret").mkdir()
    else:
        Path("secret").write_bytes(content)
    monkeypatch.setenv("ACCESS_TOKEN_FILE", "secret")
    assert refused().startswith("ACCESS_TOKEN_FILE: cannot read secret: ")


def test_secret_itself_wins_over_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text("from_file")
    monkeypatch.setenv("ACCESS_TOKEN_FILE", "secret")
    monkeypatch.setenv("ACCESS_TOKEN", "from_environment")
    assert Settings.load().access_token == SecretStr("from_environment")


def test_name_of_a_file_works_for_secrets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE_URL_FILE", "/nowhere")
    assert Settings.load().base_url == "m.tekos.co"


def test_secrets_are_not_printed() -> None:
    database_url = f"postgresql+psycopg://flow:{SECRET}@db/flow"
    settings = Settings.load(
        user="bot", password=SECRET, api_keys=f"fb_{SECRET}", secret_key=SECRET, database_url=database_url
    )
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())


# wrong values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCESS_TOKEN", f"{SECRET} with spaces"),
        ("ACCESS_TOKEN", f"{SECRET}é"),
        ("ACCESS_TOKEN", f"{SECRET}\n2"),
        ("ACCESS_TOKEN", SECRET * 1_000),
        ("FLOWBRIDGE_API_KEYS", SECRET),
        ("FLOWBRIDGE_API_KEYS", f"{A},{SECRET}"),
        ("FLOWBRIDGE_API_KEYS", f"{A},fb_{SECRET[:31]}"),
        ("FLOWBRIDGE_API_KEYS", "fb_"),
        ("FLOWBRIDGE_API_KEYS", "fb_a"),
        ("FLOWBRIDGE_API_KEYS", A[:-1]),
        ("FLOWBRIDGE_API_KEYS", f"{A}é"),
        ("FLOWBRIDGE_API_KEYS", f"{A}\x7f"),
        ("FLOWBRIDGE_API_KEYS", A * 30),
        ("FLOWBRIDGE_ALLOW_HTTP", "maybe"),
        ("FLOWBRIDGE_REGISTRATION", "maybe"),
        ("FLOWBRIDGE_PASS_FEDERATION", "maybe"),
        ("FLOWBRIDGE_CA_FILE", "/nowhere/ca.pem"),
        ("FLOWBRIDGE_PUBLIC_URL", "bridge.example.org"),
        ("FLOWBRIDGE_PUBLIC_URL", "ftp://bridge.example.org"),
        ("FLOWBRIDGE_PUBLIC_URL", f"https://user:{SECRET}@bridge.example.org"),
        ("FLOWBRIDGE_PUBLIC_URL", "https://bridge.example.org/?x"),
        ("FLOWBRIDGE_PUBLIC_URL", "https://bridge.example.org:http"),
        ("FLOWBRIDGE_PUBLIC_URL", "https:///x"),
        ("FLOWBRIDGE_PUBLIC_URL", "https://bridge.example.org\n"),
        ("FLOWBRIDGE_AUTO_JOIN", "true"),
        ("FLOWBRIDGE_AUTO_JOIN", "@alice"),
        ("FLOWBRIDGE_VERIFY_USERS", "@alice"),
        ("FLOWBRIDGE_VERIFY_USERS", "all"),
        ("FLOWBRIDGE_VERIFY_USERS", "hs.example"),
        ("FLOWBRIDGE_AUTO_JOIN", "https://hs.example"),
        ("FLOWBRIDGE_AUTO_JOIN", "*.example.org"),
        ("FLOWBRIDGE_AUTO_JOIN", "#room:hs.example"),
        ("FLOWBRIDGE_AUTO_JOIN", "off, hs.example"),
        ("FLOWBRIDGE_AUTO_JOIN", "all own"),
        ("FLOWBRIDGE_AUTO_JOIN", ","),
        ("FLOWBRIDGE_AUTO_JOIN", " ".join(f"hs{number}.example" for number in range(1_001))),
        ("FLOWBRIDGE_WAIT_SECONDS", "soon"),
        ("FLOWBRIDGE_WAIT_SECONDS", "0"),
        ("FLOWBRIDGE_WAIT_SECONDS", "-1"),
        ("FLOWBRIDGE_WAIT_SECONDS", "301"),
        ("FLOWBRIDGE_WAIT_SECONDS", "nan"),
        ("FLOWBRIDGE_REQUEST_SECONDS", "0"),
        ("FLOWBRIDGE_REQUEST_SECONDS", "inf"),
        ("FLOWBRIDGE_LEASE_SECONDS", "-30"),
        ("FLOWBRIDGE_LEASE_SECONDS", "601"),
        ("FLOWBRIDGE_LEASE_SECONDS", "nan"),
        ("FLOWBRIDGE_ENCRYPTED_ROOMS", "perhaps"),
        ("FLOWBRIDGE_REUSED_TXN_ID", "drop"),
        ("FLOWBRIDGE_KEEP_CONTENTS", "some"),
        ("FLOWBRIDGE_MAX_QUEUED", "0"),
        ("FLOWBRIDGE_MAX_QUEUED", "many"),
        ("FLOWBRIDGE_MAX_QUEUED_PER_ROOM", "0"),
        ("FLOWBRIDGE_MAX_QUEUED_PER_ROOM", "1.5"),
        ("FLOWBRIDGE_MAX_DATABASE_BYTES", "0"),
        ("FLOWBRIDGE_MAX_DATABASE_BYTES", "1GiB"),
        ("FLOWBRIDGE_MIN_FREE_DISK_BYTES", "-1"),
        ("FLOWBRIDGE_MAX_WAITING", "0"),
        ("FLOWBRIDGE_MAX_SHARE", "0"),
        ("FLOWBRIDGE_MAX_SHARE", "1.01"),
        ("FLOWBRIDGE_MAX_SHARE", "nan"),
        ("FLOWBRIDGE_KEEP_QUEUED_DAYS", "0"),
        ("FLOWBRIDGE_KEEP_QUEUED_DAYS", "400"),
        ("FLOWBRIDGE_MAX_SENT", "-1"),
        ("FLOWBRIDGE_KEEP_SENT_DAYS", "-1"),
        ("FLOWBRIDGE_KEEP_CONTENT_DAYS", "-1"),
        ("FLOWBRIDGE_KEEP_CONTENT_DAYS", "nan"),
        ("FLOWBRIDGE_KEEP_SENT_HOURS", "-1"),
        ("FLOWBRIDGE_KEEP_SENT_HOURS", "nan"),
        ("FLOWBRIDGE_KEEP_DEAD_DAYS", "-0.5"),
        ("FLOWBRIDGE_KEEP_DEAD_DAYS", "inf"),
        ("FLOWBRIDGE_TRUSTED_PROXIES", "proxy.example.org"),
        ("FLOWBRIDGE_TRUSTED_PROXIES", "10.0.0.1, 10.0.0.1/8"),
        ("FLOWBRIDGE_TRUSTED_PROXIES", "*"),
        ("FLOWBRIDGE_FETCH_ALLOW", "*"),
        ("FLOWBRIDGE_FETCH_ALLOW", "http://files.lan"),
        ("FLOWBRIDGE_FETCH_ALLOW", "10.0.0.1/8"),
        ("FLOWBRIDGE_FETCH_ALLOW", "10.0.0.999"),
        ("FLOWBRIDGE_MAX_FILE_BYTES", "0"),
        ("FLOWBRIDGE_OPERATIONS_PORT", "-1"),
        ("FLOWBRIDGE_OPERATIONS_PORT", "65536"),
        ("FLOWBRIDGE_OPERATIONS_PORT", "http"),
        ("FLOWBRIDGE_LOG_FORMAT", "xml"),
        ("FLOWBRIDGE_LOG_LEVEL", "loud"),
        ("FLOWBRIDGE_LOG_LEVEL", "20"),
    ],
)
def test_wrong_value_is_one_line_that_names_the_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert refused().startswith(f"{name}: ")


def test_wrong_inviter_is_named_with_what_may_stand_there() -> None:
    assert refused(auto_join="own, *.example.org") == (
        "FLOWBRIDGE_AUTO_JOIN: '*.example.org' is neither own, all or off, nor a user id (@alice:example.org) or a "
        "server (example.org)"
    )
    assert refused(auto_join="off, example.org") == (
        "FLOWBRIDGE_AUTO_JOIN: off stands alone, without users and servers beside it"
    )


def test_wrong_secret_from_a_file_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text(f"{SECRET} {SECRET}")
    monkeypatch.setenv("ACCESS_TOKEN_FILE", "secret")
    assert refused().startswith("ACCESS_TOKEN: ")


def test_all_wrong_values_are_named() -> None:
    line = refused(log_level="loud", wait_seconds="soon")
    assert "FLOWBRIDGE_LOG_LEVEL: " in line
    assert "FLOWBRIDGE_WAIT_SECONDS: " in line


@pytest.mark.parametrize("values", [{"user": "bot"}, {"password": SECRET}])
def test_user_and_password_go_together(values: dict[str, str]) -> None:
    line = refused(**values)
    assert "FLOWBRIDGE_USER" in line
    assert "FLOWBRIDGE_PASSWORD" in line


def test_token_and_user_exclude_each_other() -> None:
    line = refused(user="bot", password=SECRET, access_token="syt_x")
    assert "ACCESS_TOKEN" in line
    assert "FLOWBRIDGE_USER" in line


@pytest.mark.parametrize(
    ("request_seconds", "lease_seconds", "good"),
    [(10, 15, True), (10, 14.9, False), (25, 30, True), (25.5, 30, False), (300, 30, False), (300, 305, True)],
)
def test_lease_outlives_a_request_by_5_seconds(request_seconds: float, lease_seconds: float, *, good: bool) -> None:
    values = {"request_seconds": request_seconds, "lease_seconds": lease_seconds}
    if good:
        assert Settings.load(**values).lease_seconds == lease_seconds
    else:
        line = refused(**values)
        assert line.startswith("FLOWBRIDGE_LEASE_SECONDS: ")
        assert "FLOWBRIDGE_REQUEST_SECONDS" in line


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///flowbridge.db", "flowbridge.db"),
        ("sqlite:////srv/flow.db", "/srv/flow.db"),
        ("sqlite://", None),
        ("postgresql+psycopg://db/flow", None),
        ("postgresql:///flow", None),
    ],
)
def test_database_file_is_that_of_sqlite(url: str, file: str | None) -> None:
    assert Settings.load(database_url=url).database_file == (Path(file) if file else None)


@pytest.mark.parametrize("values", [{"access_token": "syt_x"}, {"user": "bot", "password": "x"}])
def test_token_or_password_makes_a_bot(values: dict[str, str]) -> None:
    assert Settings.load(**values).has_bot


@pytest.mark.parametrize(
    ("text", "keys"),
    [(A, [A]), (f"{A},{B}", [A, B]), (f" {A} , {B}\n{C} ", [A, B, C]), (",", [])],
)
def test_api_keys_are_a_list_by_commas_or_spaces(text: str, keys: list[str]) -> None:
    assert [key.get_secret_value() for key in Settings.load(api_keys=text).api_keys] == keys


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().base_url = "other"


@pytest.mark.parametrize(
    ("text", "valid"), [("syt_YQ_x-._~+/=", True), ("x" * 4096, True), ("x" * 4097, False), ("", False)]
)
def test_token_has_bounds(text: str, valid: bool) -> None:
    assert is_token(text) is valid


@pytest.mark.parametrize("character", [" ", "\t", "\n", "\0", "\x7f", "é", "\xff", "\ud800", "\uff11"])
def test_token_is_visible_ascii(character: str) -> None:
    assert not is_token(f"abc{character}")


def test_file_is_not_read_when_the_secret_itself_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCESS_TOKEN_FILE", "nowhere")
    monkeypatch.setenv("ACCESS_TOKEN", "from_environment")
    assert Settings.load().access_token == SecretStr("from_environment")


def test_empty_secret_file_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text("\n")
    monkeypatch.setenv("ACCESS_TOKEN_FILE", "secret")
    assert refused() == "ACCESS_TOKEN_FILE: secret is empty"


def test_older_name_of_the_retention_of_sent_events_still_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how long contents are kept: an upgrade must not keep them for longer."""
    assert Settings.load().sent_days == 30
    monkeypatch.setenv("FLOWBRIDGE_KEEP_SENT_HOURS", "12")
    assert Settings.load().sent_days == 0.5
    monkeypatch.setenv("FLOWBRIDGE_KEEP_SENT_DAYS", "3")
    assert refused() == (
        "FLOWBRIDGE_KEEP_SENT_DAYS and FLOWBRIDGE_KEEP_SENT_HOURS, its older name, say the same: set the first"
    )
    monkeypatch.delenv("FLOWBRIDGE_KEEP_SENT_HOURS")
    assert Settings.load().sent_days == 3
