"""Settings: read once, validated, with one clear line for what is wrong."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from app.config import VARIABLES, Settings, load_settings, warn_of_unknown_settings
from app.duplicates.tables import SoftReference
from app.errors import ConfigurationError

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_every_setting_has_a_default() -> None:
    """Nothing has to be set; the embedded server is used then."""
    assert load_settings() == Settings()
    assert load_settings().database_url is None
    assert load_settings().bootstrap_url is None


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prefix and without."""
    monkeypatch.setenv("ROLLCALL_POOL_SIZE", "7")
    monkeypatch.setenv("ROLLCALL_POOL_PRE_PING", "on")
    monkeypatch.setenv("ROLLCALL_RETRY_DEADLINE", "0.5")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    monkeypatch.setenv("ROLLCALL_ADMIN_TOKEN_FILE", "/run/secrets/token")
    settings = load_settings()
    assert (settings.pool_size, settings.pool_pre_ping) == (7, True)
    assert settings.retry_policy.deadline == 0.5
    assert settings.log_level == "DEBUG"
    assert settings.admin_token_file == "/run/secrets/token"


def test_given_settings_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factory's argument wins."""
    monkeypatch.setenv("ROLLCALL_POOL_SIZE", "7")
    assert load_settings({"ROLLCALL_POOL_SIZE": 3}).pool_size == 3


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `DATABASE_URL= make run` means it."""
    monkeypatch.setenv("DATABASE_URL", "")
    monkeypatch.setenv("ROLLCALL_POOL_SIZE", "")
    assert load_settings() == Settings()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_every_scheme_of_postgresql_means_psycopg2(scheme: str) -> None:
    """SQLAlchemy 2.1 would take another driver for the plain one."""
    url = load_settings({"DATABASE_URL": f"{scheme}://u:p@h/d"}).database_url
    assert url is not None
    assert (url.drivername, url.password) == ("postgresql+psycopg2", "p")


def test_several_hosts_stay_in_the_query() -> None:
    """As libpq wants them."""
    url = load_settings(
        {"DATABASE_URL": "postgresql://u@/d?host=h1:5432&host=h2:5433"}
    ).database_url
    assert url is not None
    assert url.query["host"] == ("h1:5432", "h2:5433")


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("DATABASE_URL", "mysql://u:secret@h/d", "must begin with postgresql://"),
        ("DATABASE_URL", "sqlite:///x.db", "must begin with postgresql://"),
        ("DATABASE_URL", "postgresql://u:secret@h1:5432,h2:5433/d", "is not a database URL"),
        ("DATABASE_URL", "secret", "is not a database URL"),
        ("DATABASE_URL", "postgresql://u:secret@h", "names no database"),
        ("ROLLCALL_ADMIN_URL", "oracle://u:secret@h/d", "must begin with postgresql://"),
        ("DATABASE_URL", "postgresql://u:sec@secret@h/d", "has an @ in its user or password"),
        ("BIND", "127.0.0.1:99999", "must be host"),
        ("BIND", "127.0.0.1:http", "must be host"),
        ("BIND", "::1", "must be host"),
        ("PORT", "8_000", "whole number"),
        ("PORT", "http", "whole number from 0 to 65535"),
        ("PORT", "65536", "whole number from 0 to 65535"),
        ("WEB_CONCURRENCY", "0", "whole number"),
        ("LOG_LEVEL", "loud", "must be one of DEBUG"),
        ("ROLLCALL_POOL_SIZE", "1.5", "whole number"),
        ("ROLLCALL_POOL_SIZE", True, "whole number"),
        ("ROLLCALL_POOL_TIMEOUT", "nan", "number of seconds"),
        ("ROLLCALL_POOL_TIMEOUT", "soon", "number of seconds"),
        ("ROLLCALL_POOL_PRE_PING", "maybe", "must be one of on"),
        ("ROLLCALL_SOFT_REFERENCES", "ticket.employee_id", "must be like ticket.employee_id="),
        ("ROLLCALL_SOFT_REFERENCES", "employee_id=employee", "must be like"),
        ("ROLLCALL_SOFT_REFERENCES", ".employee_id=employee", "must be like"),
        ("ROLLCALL_SOFT_REFERENCES", "ticket.=employee", "must be like"),
        ("ROLLCALL_SOFT_REFERENCES", "ticket.employee_id=", "must be like"),
        ("ROLLCALL_SOFT_REFERENCES", "a.b=c,", "separated by commas"),
        ("ROLLCALL_REQUEST_TIMEOUT", "0", "number of seconds from 0.1 to 3600"),
        ("ROLLCALL_RATE_LIMIT", "many", "must be like 100/minute"),
        ("ROLLCALL_RATE_LIMIT", "0/minute", "must be like 100/minute"),
        ("ROLLCALL_RATE_LIMIT", ";", "must be like 100/minute"),
        ("ROLLCALL_RATE_LIMIT_STORAGE", "memcached://h:1", "must be like redis://"),
        ("ROLLCALL_RATE_LIMIT_STORAGE", "redis://:secret@h:x/0", "must be like redis://"),
        ("ROLLCALL_RATE_LIMIT_STORAGE", "redis://[secret", "must be like redis://"),
        ("ROLLCALL_TRUSTED_PROXIES", "all", "whole number from 0 to 10"),
        ("ROLLCALL_CORS_ORIGINS", "https://a.example/", "must be origins such as https://"),
        ("ROLLCALL_CORS_ORIGINS", "a.example", "must be origins such as https://"),
        ("ROLLCALL_CORS_ORIGINS", "https://*.example", "must be origins such as https://"),
        ("ROLLCALL_CORS_ORIGINS", "*, https://a.example", "or * alone"),
        ("ROLLCALL_CORS_ORIGINS", "https://a.example,", "separated by commas"),
        ("ROLLCALL_LOG_FORMAT", "xml", "must be one of auto, json, console"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "secret", "must be an address such as http://"),
        ("ROLLCALL_AUTH", "maybe", "must be one of token, off"),
    ],
)
def test_a_bad_value_is_one_clear_line_without_secrets(
    name: str, value: Any, complaint: str
) -> None:
    """It names the variable and says what would be right."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings({name: value})
    line = str(caught.value)
    assert line.startswith(f"{name} ")
    assert complaint in line
    assert "secret" not in line
    assert "\n" not in line
    assert caught.value.__cause__ is None


def test_counting_in_redis_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how to get it."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match=r"needs the package redis: .*rollcall\[redis\]"):
        load_settings({"ROLLCALL_RATE_LIMIT_STORAGE": "redis://h:6379/0"})


def test_origins_are_separated_by_commas() -> None:
    """With white space or without."""
    value = "http://localhost:3000 ,https://portal.example.com"
    assert load_settings({"ROLLCALL_CORS_ORIGINS": value}).cors_origins == (
        "http://localhost:3000",
        "https://portal.example.com",
    )


@pytest.mark.parametrize("variable", ["ROLLCALL_ADMIN_URL", "ROLLCALL_READ_URL"])
def test_a_second_url_needs_a_database_url(variable: str) -> None:
    """The bootstrap would prepare one database and the service use another."""
    with pytest.raises(ConfigurationError, match=f"{variable} is set, but DATABASE_URL is not"):
        load_settings({variable: "postgresql://u@h/d"})


def test_an_unknown_variable_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a suggestion where there is a close one."""
    monkeypatch.setenv("ROLLCALL_POOLSIZE", "7")
    monkeypatch.setenv("ROLLCALL_XYZZY", "7")
    assert load_settings() == Settings()
    with caplog.at_level(logging.WARNING):
        warn_of_unknown_settings()
    assert [record.getMessage() for record in caplog.records] == [
        "unknown setting ROLLCALL_POOLSIZE is ignored; did you mean ROLLCALL_POOL_SIZE?",
        "unknown setting ROLLCALL_XYZZY is ignored",
    ]


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("localhost", "localhost:8000"),
        ("[::1]", "[::1]:8000"),
        ("[::1]:80", "[::1]:80"),
        ("unix:/run/rollcall.sock", "unix:/run/rollcall.sock"),
    ],
)
def test_the_address_is_made_of_bind_and_port(bind: str, address: str) -> None:
    """The port is added to a host that has none."""
    assert load_settings({"BIND": bind}).address == address


def test_no_password_shows_in_the_settings() -> None:
    """They may be logged."""
    for url in ("postgresql://u:secret@h/d", "postgresql:///d?user=u&password=secret"):
        settings = load_settings({"DATABASE_URL": url})
        assert "secret" not in repr(settings)
        assert settings.database_url is not None
        assert settings.database_url.password == "secret"


def test_soft_references_are_columns_and_the_tables_they_refer_to() -> None:
    """Separated by commas, with white space or without; a table may have its schema in front."""
    value = " ticket.employee_id = employee,audit.entry.of=department"
    assert load_settings({"ROLLCALL_SOFT_REFERENCES": value}).soft_references == (
        SoftReference("ticket", "employee_id", "employee"),
        SoftReference("audit.entry", "of", "department"),
    )


def test_every_setting_has_a_row_in_the_readme() -> None:
    """And every row is a setting, with its default."""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| `?([^|`]*)`? \|", README.read_text("utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows] == list(VARIABLES)
    defaults = {name: item.default for name, item in VARIABLES.items()}
    for name, shown in rows:
        assert shown.strip() == _shown(defaults[name]), name


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return (
        "unset"
        if default in (None, "", ())
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )
