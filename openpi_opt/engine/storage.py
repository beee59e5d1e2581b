"""Where Optuna's copy of a study lies: sqlite or a journal file in the store, or a server.

The copy is for looking at; our own journal is the truth, and whatever the copy lacks, the next
sweep adds. So a server that goes away does not end a sweep. Its URL may hold a password, which is
shown and recorded nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from openpi_opt.errors import UserError
from openpi_opt.track.store import Store

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy.engine import URL, Connection

JOURNAL = "journal"
# What the extras of this project install.
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
_CONNECT_SECONDS = 10
_CREATION_LOCK = "openpi_opt.create"
# As much as can be: a password may have been pasted with any character in it.
_CREDENTIALS = re.compile(r"://.*@", re.DOTALL)
_QUERY = re.compile(r"(://[^?]*)\?.*", re.DOTALL)


def hidden(word: str) -> str:
    """A word of a command line without the credentials and the query of a URL in it.

    `errors.masked` is for sentences; here all that is in the word may be password.
    """
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("://...@", word))


@dataclass(frozen=True)
class OptunaStorage:
    """One of the three kinds, for one store. `shown` names it without credentials."""

    store: Store
    shown: str
    url: URL | None = None

    @staticmethod
    def of(store: Store, storage: str | None) -> OptunaStorage:
        """The one that `storage=` names.

        Raises:
            UserError: neither `journal` nor a URL of PostgreSQL or MySQL.
        """
        if storage is None:
            return OptunaStorage(store, str(store.path / "optuna.db"))
        if storage == JOURNAL:
            return OptunaStorage(store, str(store.path / "optuna.journal"))
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(storage)
        except (ArgumentError, ValueError):
            url = None
        backend = url and url.get_backend_name()
        if url is None or backend not in _DRIVERS:
            raise UserError(
                f"storage={hidden(storage)}: unknown. Use postgresql://USER@HOST/DATABASE, "
                "mysql://USER@HOST/DATABASE, or journal; null is sqlite in the store."
            )
        if "+" not in url.drivername:
            url = url.set(drivername=_DRIVERS[backend])
        return OptunaStorage(store, hidden(url.render_as_string()), url)

    @property
    def remote(self) -> bool:
        """Whether it is on a server."""
        return self.url is not None

    def study_name(self, name: str) -> str:
        """Name of a study there. A server may hold studies of that name of other stores."""
        if self.url is None:
            return name
        path = self.store.path / "optuna.id"
        if not path.exists():
            path.write_text(uuid4().hex[:12])
        return f"{name}@{path.read_text()}"

    def open(self) -> BaseStorage:
        """Open it, made when absent. Call it under the store's `optuna.lock`.

        Raises:
            UserError: the package for the server is missing.
            And what SQLAlchemy and Optuna raise: `errors` makes that readable.
        """
        import optuna

        if self.url is not None:
            return self._open_server(self.url)
        path = Path(self.shown)
        if path.suffix == ".db":
            return optuna.storages.RDBStorage(
                self.store.optuna_url, engine_kwargs={"connect_args": {"timeout": 60}}
            )
        lock = optuna.storages.journal.JournalFileSymlinkLock(str(path))
        _mend(path, lock)
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
        return optuna.storages.JournalStorage(backend)

    def _open_server(self, url: URL) -> BaseStorage:
        """Several stores may open an empty database at once, and its tables are to be made once."""
        import optuna
        import sqlalchemy

        options = {
            "connect_args": {"connect_timeout": _CONNECT_SECONDS},
            "pool_pre_ping": True,  # it may have been started anew
        }
        try:
            engine = sqlalchemy.create_engine(url, **options)
        except ModuleNotFoundError as error:
            raise UserError(
                f"storage={self.shown} needs the package {error.name}, which is not installed.\n"
                f"Install it: pip install 'openpi_opt[{url.get_backend_name()}]'"
            ) from error
        try:
            with engine.connect() as connection, _creating(connection):
                return optuna.storages.RDBStorage(
                    url.render_as_string(hide_password=False), engine_kwargs=options
                )
        finally:
            engine.dispose()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """A database that is away, damaged, locked, full or of another version is the user's."""
        import optuna
        import sqlalchemy.exc

        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            cause = error.__cause__ or error
            detail = str(getattr(cause, "orig", None) or cause).splitlines()[0]
            raise UserError(
                f"Optuna's database {self.shown} cannot be used: {self._without_password(detail)}."
                f"\nThe journals of the studies do not depend on it. {self._advice()}"
            ) from error
        except RuntimeError as error:
            if "version" not in str(error).lower():
                raise
            raise UserError(
                f"Optuna's database {self.shown} was written by another version of Optuna "
                f"(this is {optuna.__version__}).\nInstall that version, or "
                + ("use another database." if self.remote else "move the file away:")
                + " The next run fills a new one from the journal."
            ) from error

    def _advice(self) -> str:
        if self.remote:
            return "Mend the server or the URL, or leave out storage=; the next run adds the rest."
        return (
            "Free space or mend permissions; if it is damaged, move it away: the next run fills a "
            "new one from the journal."
        )

    def _without_password(self, text: str) -> str:
        password = self.url.password if self.url is not None else None
        return text.replace(str(password), "...") if password else text


@contextmanager
def _creating(connection: Connection) -> Iterator[None]:
    """A lock of the server's, which ends with the connection."""
    from sqlalchemy import text

    if connection.dialect.name == "postgresql":
        take = "SELECT pg_advisory_lock(hashtext(:key))"
        release = "SELECT pg_advisory_unlock(hashtext(:key))"
    else:
        take, release = "SELECT GET_LOCK(:key, 60)", "SELECT RELEASE_LOCK(:key)"
    key = {"key": _CREATION_LOCK}
    connection.execute(text(take), key)
    connection.commit()  # the lock is the session's, and stays
    try:
        yield
    finally:
        connection.execute(text(release), key)


def _mend(path: Path, lock: object) -> None:
    """Cut off a last line that a full disk or a crash left torn; Optuna would never read on."""
    from optuna.storages.journal import JournalFileSymlinkLock

    assert isinstance(lock, JournalFileSymlinkLock)
    path.touch()
    lock.acquire()
    try:
        with path.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()
