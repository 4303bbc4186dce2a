"""Addresses of storages: what may be given, and what of it may be shown. No optuna: a mistake is told at once.

sqlite:      runs/<study>/optuna.db (default) or sqlite:///PATH; one machine, any number of workers.
PostgreSQL:  `--storage postgresql://user@host/database` or LDA_STORAGE; several machines. Passwords are best left to
             PGPASSWORD or ~/.pgpass; one inside the URL is masked wherever the URL is shown.
journal:     `--storage journal` or `journal:PATH`; machines that share a disk but no database.

A URL is taken apart by SQLAlchemy's parser, the one that connects: what another one takes for a path or a fragment may
be the password.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, unquote

from lda.errors import UsageError, unknown

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

# SQLAlchemy takes a quarter of a second to import: where a URL may hold a secret, and only there.

VARIABLE = "LDA_STORAGE"
JOURNAL = "journal:"
HIDDEN = "***"
DATABASE, _LOG = "optuna.db", "optuna-journal.log"  # of a study's own, in its folder
_SQLITE = "sqlite:///"
_SCHEMES = ("sqlite", "postgresql", "journal")
_FORM = "postgresql://USER@HOST/DATABASE"
_SHORT = 4  # characters; a shorter secret is hidden where it stands by itself, not inside other words


# --- what may be given -----------------------------------------------------------------------------------------------


def asked_for(given: str | None) -> str | None:
    """What --storage says, else the environment, where empty counts as unset. UsageError for an empty option."""
    if given is not None:
        if not given.strip():
            raise UsageError(f"--storage is empty; expected {_FORM}, journal[:PATH] or {_SQLITE}PATH")
        return given.strip()
    return os.environ.get(VARIABLE, "").strip() or None


def storage_url(requested: str | None, folder: Path) -> str:
    """The URL of a study's storage, None: its own SQLite database. Paths in it are absolute.

    Raises UsageError for a kind that is not supported and for an address that is none.
    """
    if requested is None:
        return _sqlite_url(folder.resolve() / DATABASE)
    if requested == "journal":
        return f"{JOURNAL}{folder.resolve() / _LOG}"
    scheme, colon, rest = requested.partition(":")
    kind, _, driver = scheme.lower().partition("+")
    kind = "postgresql" if kind == "postgres" else kind  # the common alias, which SQLAlchemy does not take
    if kind == "postgresql":
        return _postgresql_url(requested, rest)
    if kind == "sqlite" and driver in ("", "pysqlite"):
        return _sqlite_url(_sqlite_path(requested, rest))
    if kind == "journal" and colon:
        if not (path := rest.removeprefix("//")):
            raise UsageError(f"--storage {requested}: the path is missing; expected journal:PATH, or journal alone")
        return f"{JOURNAL}{_absolute(path)}"
    shown = masked(requested)
    raise UsageError(f"--storage {shown}: {unknown('kind of storage', _scheme(requested) or shown, _SCHEMES)}")


def _postgresql_url(requested: str, rest: str) -> str:
    if not rest.startswith("//") or rest == "//":
        raise UsageError(f"--storage {masked(requested)}: the address is missing; expected {_FORM}")
    url = _parsed(f"postgresql+psycopg:{rest}")
    if url is None:
        raise UsageError(
            f"--storage {masked(requested)}: no URL that can be read; expected {_FORM}. In a name or a "
            "password write : / @ as %3A %2F %40, or leave the password to PGPASSWORD or ~/.pgpass"
        )
    if not (url.host or url.database or url.query):
        raise UsageError(f"--storage {masked(requested)}: the address is missing; expected {_FORM}")
    return url.render_as_string(hide_password=False)


def _sqlite_path(requested: str, rest: str) -> Path:
    path, options, _ = rest.partition("?")
    name = unquote(path.removeprefix("///"))
    if path in ("", "//", "///") or name == ":memory:" or "mode=memory" in rest or name.startswith("file:"):
        raise UsageError(
            f"--storage {masked(requested)}: the workers are processes of their own and need a database in a file; "
            f"expected {_SQLITE}PATH"
        )
    if not path.startswith("///"):
        raise UsageError(f"--storage {masked(requested)}: expected {_SQLITE}PATH, an absolute one with four slashes")
    if options:
        raise UsageError(
            f"--storage {masked(requested)}: a SQLite database takes no options; a ? in its path is written %3F"
        )
    return _absolute(name)


def _sqlite_url(path: Path) -> str:
    return _SQLITE + quote(str(path), safe=" +/")  # as SQLAlchemy writes it


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def file_of(url: str) -> Path | None:
    """The file of a storage that is one, from its URL by `storage_url`; None for a database server."""
    if url.startswith(JOURNAL):
        return Path(url.removeprefix(JOURNAL))
    return Path(unquote(url.removeprefix(_SQLITE))) if url.startswith(_SQLITE) else None


def elsewhere(file: Path | None, study: str) -> str:
    """What begins a study anew when its storage (a file, or None: a server) holds another of its name."""
    if file is not None and file.name in (DATABASE, _LOG) and file.parent.name == study:
        return "another --output"
    return "a study file of another name, or another database"


# --- what may be shown -----------------------------------------------------------------------------------------------


def has_password(url: str) -> bool:
    """Whether the URL holds a secret, or cannot be read, so that it may."""
    return masked(url) != url


def masked(url: str) -> str:
    """The URL without its secrets: what may be printed and written. Of one that cannot be read, the scheme."""
    scheme = _scheme(url)
    if "://" not in url:
        harmless = scheme == "journal" or not re.search(r"[@=]", url)
        return url if harmless else f"{scheme}:{HIDDEN}"
    if scheme == "journal" or (url.lower().startswith(_SQLITE) and "?" not in url):
        return url  # a path
    parsed = _parsed(url)
    if parsed is None:
        return f"{scheme}://{HIDDEN}"
    if not _secrets(parsed):
        return url
    query = {key: HIDDEN if _is_secret(key) else value for key, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True).replace(quote_plus(HIDDEN), HIDDEN)


def without_secrets(text: str, url: str) -> str:
    """`text`, such as a driver's message, without what is secret in `url`, in whatever form it stands there."""
    parsed = _parsed(url) if "://" in url else None
    for secret in _secrets(parsed) if parsed is not None else ():
        for form in sorted({secret, quote(secret, safe=""), quote(secret, safe=" +"), quote_plus(secret)}, key=len):
            pattern = re.escape(form)
            if len(form) < _SHORT:
                pattern = rf"(?<!\w){pattern}(?!\w)"
            text = re.sub(pattern, HIDDEN, text)
    return cleaned(text)


_USERINFO = re.compile(r"(\w[\w+]*://[^:/\s@]*):([^@\n]*(?:@[^\s@]+)*)@(?=[^\s@])")
_ASSIGNED = re.compile(
    r"""([\w-]*(?:pass(?!file)(?:word|wd|phrase)?|pwd|secret|token)[\w-]*\s?=\s?)('(?:[^'\\]|\\.)*'|[^&\s]+?(?=['"]*(?:[&\s]|$)))""",
    re.IGNORECASE,
)


def cleaned(text: str) -> str:
    """A longer text (a command, a driver's message) with the secrets of every URL and connection string in it hidden.

    It rather hides too much: here nobody knows which part of the text is a URL.
    """
    text = _USERINFO.sub(rf"\1:{HIDDEN}@", text)
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)


def _scheme(url: str) -> str:
    found = re.match(r"[A-Za-z][\w+.-]*", url)
    return found.group().lower() if found else ""


def _is_secret(key: str) -> bool:
    return re.search(r"pass(?!file)|pwd|secret|token|scram_.*key", key, re.IGNORECASE) is not None


def _secrets(url: URL) -> list[str]:
    found = [url.password] if url.password else []
    for key, value in url.query.items():
        if _is_secret(key):
            found += [value] if isinstance(value, str) else value
    return [str(secret) for secret in found if secret]


def _parsed(url: str) -> URL | None:
    """The URL as the database's driver gets it; None where it is none, or what may be of a password became a host."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number
        return None
    host, database = parsed.host or "", parsed.database or ""
    odd = not re.fullmatch(r"[\w.:,%/-]*", host) or (re.search("[@:]", database) and parsed.drivername != "sqlite")
    return None if odd else parsed
