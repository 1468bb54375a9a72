"""Settings: from the environment and `.env`, validated once, frozen (contract §2).

Every secret may also come from a file: `ACCESS_TOKEN_FILE=/run/secrets/token` is read when `ACCESS_TOKEN` is not set.
"""

import difflib
import os
import re
import string
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from flowbridge.models import macaroons
from flowbridge.models.proxy import Proxy

Network = IPv4Network | IPv6Network

LEASE_MARGIN_SECONDS = 5.0  # otherwise a request could still be in flight when another process takes the room over

_BASE_URL = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?")
_HOST = re.compile(r"(?=.*[a-z])[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?", re.IGNORECASE)
_KEY = re.compile(r"fb_[\x21-\x7e]{32,1000}")
_SERVER = r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?"
_INVITER = re.compile(rf"(?:@[^\s:]+:)?{_SERVER}")
_AUTO_JOIN = frozenset({"own", "all", "off"})
_SWITCHES = frozenset({"on", "yes", "no", "true", "false", "none", "0", "1", "any", "everyone", "everybody"})
MAX_INVITERS = 1_000
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_FILES = "SECRET=FILES"  # not a possible name of an environment variable
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SOCKS = "python_socks"
_OLM = "vodozemac"
_TOKEN_RULE = "a token is visible ASCII without spaces, and not `None` or the like"  # noqa: S105 (a sentence, not a secret)
_VISIBLE = frozenset(string.ascii_letters + string.digits + string.punctuation)


# Names under which other programs know these settings.
_NEAR_MISSES = {
    "FLOWBRIDGE_ACCESS_TOKEN": "ACCESS_TOKEN",
    "MATRIX_ACCESS_TOKEN": "ACCESS_TOKEN",
    "FLOWBRIDGE_BASE_URL": "BASE_URL",
    "FLOWBRIDGE_HOMESERVER": "BASE_URL",
    "HOMESERVER_URL": "BASE_URL",
    "MATRIX_HOMESERVER": "BASE_URL",
    "MATRIX_HOMESERVER_URL": "BASE_URL",
    "FLOWBRIDGE_API_KEY": "FLOWBRIDGE_API_KEYS",
    "FLOWBRIDGE_CORS": "FLOWBRIDGE_CORS_ORIGINS",
    "CORS_ORIGINS": "FLOWBRIDGE_CORS_ORIGINS",
}
# Of the Node-RED nodes, which may run on the same machine, and of `flowbridge serve`.
_OF_OTHERS = {"FLOWBRIDGE_URL", "FLOWBRIDGE_KEY", "FLOWBRIDGE_HOST", "FLOWBRIDGE_PORT"}


class SettingsError(Exception):
    """A setting that cannot be used; the message is one line that names it, without secrets."""


def _name(name: str, default: Any = None) -> Any:
    """A field that is read from the environment variable `name` only. `default`: a value, or what makes it."""
    if callable(default):
        return Field(default_factory=default, validation_alias=name)
    return Field(default=default, validation_alias=name)


def _of_encrypted_rooms() -> str:
    """The bridge encrypts where it can."""
    return "refuse" if find_spec(_OLM) is None else "encrypt"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        case_sensitive=True,
    )

    base_url: str = _name("BASE_URL", "m.tekos.co")
    access_token: SecretStr | None = _name("ACCESS_TOKEN")
    user: str | None = _name("FLOWBRIDGE_USER")
    password: SecretStr | None = _name("FLOWBRIDGE_PASSWORD")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = _name("FLOWBRIDGE_API_KEYS", ())
    allow_http: bool = _name("FLOWBRIDGE_ALLOW_HTTP", False)
    ca_file: Path | None = _name("FLOWBRIDGE_CA_FILE")
    proxy: SecretStr | None = _name("FLOWBRIDGE_PROXY")  # it may hold a password
    database_url: SecretStr = _name("FLOWBRIDGE_DATABASE_URL", SecretStr("sqlite:///flowbridge.db"))
    secret_key: SecretStr | None = _name("FLOWBRIDGE_SECRET_KEY")
    public_url: str | None = _name("FLOWBRIDGE_PUBLIC_URL")
    encrypted_rooms: Literal["refuse", "allow", "encrypt"] = _name("FLOWBRIDGE_ENCRYPTED_ROOMS", _of_encrypted_rooms)
    auto_join: Annotated[tuple[str, ...], NoDecode] = _name("FLOWBRIDGE_AUTO_JOIN", ("own",))
    verify_users: Annotated[tuple[str, ...], NoDecode] = _name("FLOWBRIDGE_VERIFY_USERS", ())
    registration: bool = _name("FLOWBRIDGE_REGISTRATION", True)
    pass_federation: bool = _name("FLOWBRIDGE_PASS_FEDERATION", True)
    schemas_dir: Path | None = _name("FLOWBRIDGE_SCHEMAS_DIR")
    hooks_file: Path | None = _name("FLOWBRIDGE_HOOKS_FILE")
    wait_seconds: Annotated[float, Field(gt=0, le=300)] = _name("FLOWBRIDGE_WAIT_SECONDS", 10.0)
    request_seconds: Annotated[float, Field(gt=0, le=300)] = _name("FLOWBRIDGE_REQUEST_SECONDS", 10.0)
    lease_seconds: Annotated[float, Field(gt=0, le=600)] = _name("FLOWBRIDGE_LEASE_SECONDS", 30.0)
    set_aside_seconds: Annotated[float, Field(ge=0, le=604_800)] = _name("FLOWBRIDGE_SET_ASIDE_SECONDS", 300.0)
    reused_txn_id: Literal["send", "replay"] = _name("FLOWBRIDGE_REUSED_TXN_ID", "send")
    max_queued: Annotated[int, Field(ge=1)] = _name("FLOWBRIDGE_MAX_QUEUED", 1_000_000)
    max_queued_per_room: Annotated[int, Field(ge=1)] = _name("FLOWBRIDGE_MAX_QUEUED_PER_ROOM", 100_000)
    max_database_bytes: Annotated[int, Field(ge=1)] = _name("FLOWBRIDGE_MAX_DATABASE_BYTES", 1024**3)
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = _name("FLOWBRIDGE_MIN_FREE_DISK_BYTES", 256 * 1024**2)
    max_waiting: Annotated[int, Field(ge=1)] = _name("FLOWBRIDGE_MAX_WAITING", 10_000)
    wrong_keys_per_minute: Annotated[int, Field(ge=1)] = _name("FLOWBRIDGE_WRONG_KEYS_PER_MINUTE", 60)
    max_share: Annotated[float, Field(gt=0, le=1)] = _name("FLOWBRIDGE_MAX_SHARE", 0.5)
    keep_queued_days: Annotated[float, Field(gt=0, le=365)] = _name("FLOWBRIDGE_KEEP_QUEUED_DAYS", 7.0)
    max_sent: Annotated[int, Field(ge=0)] = _name("FLOWBRIDGE_MAX_SENT", 1_000_000)
    keep_sent_days: Annotated[float, Field(ge=0, le=36_500)] = _name("FLOWBRIDGE_KEEP_SENT_DAYS", 30.0)
    # What it was called before: still obeyed, since it says how long contents are kept.
    keep_sent_hours: Annotated[float, Field(ge=0, le=87_600)] | None = _name("FLOWBRIDGE_KEEP_SENT_HOURS")
    keep_content_days: Annotated[float, Field(ge=0, le=36_500)] | None = _name("FLOWBRIDGE_KEEP_CONTENT_DAYS")
    keep_contents: Literal["all", "plain", "none"] = _name("FLOWBRIDGE_KEEP_CONTENTS", "all")
    keep_dead_days: Annotated[float, Field(ge=0, le=36_500)] = _name("FLOWBRIDGE_KEEP_DEAD_DAYS", 30.0)
    max_file_bytes: Annotated[int, Field(ge=1)] | None = _name("FLOWBRIDGE_MAX_FILE_BYTES")
    max_hook_bytes: Annotated[int, Field(ge=1_024, le=25 * 1024**2)] = _name("FLOWBRIDGE_MAX_HOOK_BYTES", 1024**2)
    fetch_allow: Annotated[tuple[str, ...], NoDecode] = _name("FLOWBRIDGE_FETCH_ALLOW", ())
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode] = _name("FLOWBRIDGE_TRUSTED_PROXIES", ())
    cors_origins: Annotated[tuple[str, ...], NoDecode] = _name("FLOWBRIDGE_CORS_ORIGINS", ())
    operations_port: Annotated[int, Field(ge=0, le=65_535)] | None = _name("FLOWBRIDGE_OPERATIONS_PORT")
    log_format: Literal["text", "json"] = _name("FLOWBRIDGE_LOG_FORMAT", "text")
    log_level: Literal["debug", "info", "warning", "error"] = _name("FLOWBRIDGE_LOG_LEVEL", "info")
    secret_files: dict[str, Path] = _name(_FILES, {})  # of the secrets read from files, by variable

    @classmethod
    def load(cls, **values: Any) -> Self:
        """Read the settings; `values`, by field name, override the environment. Raises SettingsError."""
        try:
            return cls(**{_variable(cls.model_fields[name]): value for name, value in values.items()})
        except ValidationError as error:
            raise SettingsError("; ".join(_line(item) for item in error.errors())) from None
        except UnicodeDecodeError:
            raise SettingsError(".env: the file is not UTF-8") from None

    def read_again(self, field: str) -> str | None:
        """The present content of a secret's file; None for a secret that has none. Raises SettingsError."""
        name = _variable(type(self).model_fields[field])
        path = self.secret_files.get(name)
        if path is None:
            return None
        secret = _read_secret(name, path)
        if field == "access_token" and not is_token(secret):
            raise SettingsError(f"{name}_FILE: {path}: {_TOKEN_RULE}")
        return secret

    @classmethod
    def misnamed(cls) -> dict[str, str]:
        """Environment variables that look like settings but are none → the setting that is probably meant, or ""."""
        settings = {_variable(field) for field in cls.model_fields.values()} - {_FILES}
        names = settings | {f"{name}_FILE" for name in settings} | _OF_OTHERS
        found = {}
        for name in {**dotenv_values(".env"), **os.environ}:
            if name in names or not (name.startswith("FLOWBRIDGE_") or name.upper() in _NEAR_MISSES):
                continue
            close = difflib.get_close_matches(name.upper(), settings, 1, 0.8)
            found[name] = _NEAR_MISSES.get(name.upper()) or (close[0] if close else "")
        return found

    @property
    def unused_proxy(self) -> str:
        """The variable that names a proxy to other programs, and counts for nothing here; "" when there is none."""
        url = urlsplit(self.base_url if "://" in self.base_url else f"https://{self.base_url}")
        wanted = ("http" if url.scheme == "http" else "https", "all")
        kind = next((kind for kind in wanted if kind in getproxies_environment()), None)
        is_needless = self.proxy is not None or url.hostname in _LOOPBACK
        if kind is None or is_needless or proxy_bypass(url.netloc):
            return ""
        name = f"{kind}_proxy"
        return name if os.environ.get(name) else name.upper()

    @property
    def has_bot(self) -> bool:
        """Whether an account is configured that the bridge can act as."""
        return self.access_token is not None or self.user is not None

    @property
    def is_to_encrypt(self) -> bool:
        """Whether the bot's device is wanted from the start, and not only once an encrypted room is met."""
        return self.encrypted_rooms == "encrypt" and "encrypted_rooms" in self.model_fields_set

    @property
    def sent_days(self) -> float:
        """For how long the delivery log keeps what was sent, under either name of the setting."""
        return self.keep_sent_days if self.keep_sent_hours is None else self.keep_sent_hours / 24

    @property
    def database_file(self) -> Path | None:
        """The file of an SQLite database; None for another database, or one in memory."""
        url = self.database_url.get_secret_value()
        path = url.partition("///")[2].partition("?")[0]
        return Path(path) if url.startswith("sqlite") and path and path != ":memory:" else None

    @field_validator("log_format", "log_level", "encrypted_rooms", "keep_contents", "reused_txn_id", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [key for key in value.replace(",", " ").split() if key] if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(_KEY.fullmatch(key.get_secret_value()) for key in keys):
            raise ValueError(
                "every key is fb_ and 32 to 1,000 characters of visible ASCII after it, so that it cannot be guessed; "
                "`python -c 'import secrets; print(\"fb_\" + secrets.token_urlsafe(32))'` makes one"
            )
        return keys

    @field_validator("fetch_allow", mode="before")
    @classmethod
    def _are_destinations(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = tuple(value.replace(",", " ").split())
        for text in found:
            try:
                ip_network(text)
            except ValueError:
                if "/" in text or not _HOST.fullmatch(text):
                    raise ValueError(
                        f"host names, addresses and networks (10.0.0.0/8), separated by commas; {text[:80]!r} is none"
                    ) from None
        return found

    @field_validator("encrypted_rooms")
    @classmethod
    def _can_encrypt(cls, value: str) -> str:
        if value == "encrypt" and find_spec(_OLM) is None:
            raise ValueError("encrypt needs a library: pip install 'flowbridge[e2ee]'")
        return value

    @field_validator("auto_join", mode="before")
    @classmethod
    def _are_inviters(cls, value: Any) -> Any:
        """`own`, `all`, `off`, or users and servers; `own` may stand among these."""
        if not isinstance(value, str):
            return value
        found = [text.lower() if text.lower() in _AUTO_JOIN else text for text in value.replace(",", " ").split()]
        for text in found or [value]:
            if text not in _AUTO_JOIN and (text.lower() in _SWITCHES or not _INVITER.fullmatch(text)):
                raise ValueError(
                    f"{text[:80]!r} is neither own, all or off, nor a user id (@alice:example.org) or a server "
                    "(example.org)"
                )
        if len(found) > 1 and (alone := {"all", "off"} & set(found)):
            raise ValueError(f"{min(alone)} stands alone, without users and servers beside it")
        if len(found) > MAX_INVITERS:
            raise ValueError(f"at most {MAX_INVITERS} users and servers can be named")
        return tuple(found)

    @field_validator("verify_users", mode="before")
    @classmethod
    def _are_users(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = tuple(value.replace(",", " ").split())
        for text in found:
            if not text.startswith("@") or not _INVITER.fullmatch(text):
                raise ValueError(f"{text[:80]!r} is not a user id (@alice:example.org)")
        if len(found) > MAX_INVITERS:
            raise ValueError(f"at most {MAX_INVITERS} users can be named")
        return found

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _are_networks(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = []
        for text in value.replace(",", " ").split():
            try:
                found.append(ip_network(text))
            except ValueError as error:
                raise ValueError(f"addresses and networks (10.0.0.0/8), separated by commas; {error}") from None
        return tuple(found)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _are_origins(cls, value: Any) -> Any:
        """As a browser writes an origin: in lower case, without the port that its scheme has anyway."""
        if not isinstance(value, str):
            return value
        found = [text.lower() for text in value.replace(",", " ").split()]
        if wrong := [text for text in found if text != "*" and not _ORIGIN.fullmatch(text)]:
            raise ValueError(
                f"{wrong[0][:100]!r} is no origin: https://app.example.org, without a path or a slash, or *"
            )
        return tuple(re.sub(r"^(https://.*):443$|^(http://.*):80$", r"\1\2", text) for text in found)

    @field_validator("access_token")
    @classmethod
    def _is_token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not is_token(token.get_secret_value()):
            raise ValueError(_TOKEN_RULE)
        return token

    @field_validator("public_url")
    @classmethod
    def _is_base_url(cls, url: str | None) -> str | None:
        if url is not None and not _BASE_URL.fullmatch(url):
            raise ValueError("a base URL is https://host or http://host, with a port or a path if need be")
        return url.rstrip("/") if url else None

    @field_validator("proxy")
    @classmethod
    def _is_proxy(cls, proxy: SecretStr | None) -> SecretStr | None:
        if proxy is not None and Proxy.parse(proxy.get_secret_value()).scheme == "socks5" and find_spec(_SOCKS) is None:
            raise ValueError("a socks5 proxy needs the extra socks: pip install 'flowbridge[socks]'")
        return proxy

    @field_validator("ca_file")
    @classmethod
    def _exists(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("FLOWBRIDGE_USER and FLOWBRIDGE_PASSWORD go together")
        if self.user is not None and self.access_token is not None:
            raise ValueError("ACCESS_TOKEN and FLOWBRIDGE_USER both name the bot account: set one of them")
        if self.keep_sent_hours is not None and "keep_sent_days" in self.model_fields_set:
            raise ValueError(
                "FLOWBRIDGE_KEEP_SENT_DAYS and FLOWBRIDGE_KEEP_SENT_HOURS, its older name, say the same: set the first"
            )
        if self.request_seconds + LEASE_MARGIN_SECONDS > self.lease_seconds:
            raise ValueError(
                f"FLOWBRIDGE_LEASE_SECONDS: {self.lease_seconds:g} s is too short for FLOWBRIDGE_REQUEST_SECONDS "
                f"({self.request_seconds:g} s): a lease must outlive a request by {LEASE_MARGIN_SECONDS:g} s"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, dotenv_settings, _SecretFiles(settings_cls, dotenv_settings)


class _SecretFiles(PydanticBaseSettingsSource):
    """`NAME_FILE` for every secret `NAME`."""

    def __init__(self, settings_cls: type[BaseSettings], dotenv: PydanticBaseSettingsSource) -> None:
        super().__init__(settings_cls)
        from_dotenv = dotenv.env_vars if isinstance(dotenv, DotEnvSettingsSource) else {}
        self._variables = {**from_dotenv, **os.environ}
        self._used: dict[str, Path] = {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        name = _variable(field)
        path = self._variables.get(f"{name}_FILE") if "SecretStr" in str(field.annotation) else None
        if not path or self._variables.get(name):
            return None, name, False
        self._used[name] = Path(path)
        return _read_secret(name, Path(path)), name, False

    def __call__(self) -> dict[str, Any]:
        found = {}
        for field_name, field in self.settings_cls.model_fields.items():
            value, name, _ = self.get_field_value(field, field_name)
            if value:
                found[name] = value
        found[_FILES] = self._used
        return found


def _read_secret(name: str, path: Path) -> str:
    """The content of a secret's file. Raises SettingsError."""
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{name}_FILE: cannot read {path}: {reason}") from None
    if not secret:
        raise SettingsError(f"{name}_FILE: {path} is empty")
    return secret


def is_token(text: str) -> bool:
    """Whether this can be an access token at all: homeservers answer 500 to some texts that cannot."""
    return 0 < len(text) <= 4096 and _VISIBLE.issuperset(text) and not macaroons.breaks(text)


def _variable(field: FieldInfo) -> str:
    return str(field.validation_alias)


def _line(error: Any) -> str:
    """One pydantic error in one line, without the value: it may be a secret."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(message)
    return f"{error['loc'][0]}: {message}"
