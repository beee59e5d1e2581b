"""The folder that holds all local state: databases, artifacts and one folder per study."""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpi_opt.errors import UserError, near

DEFAULT_STORE = "mlruns"
MAX_STUDY_NAME = 100
# Letters, digits and `_` may begin a name: a leading dot hides a folder, a leading `-` reads as an
# option, and nothing here can leave the folder, need quoting in a shell or in an MLflow filter.
_STUDY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-=,+]*")
_STUDY_FILES = ("study.json", "journal.jsonl")


@dataclass(frozen=True)
class Store:
    """Paths inside one store folder. Make it with `Store.open`."""

    path: Path

    @staticmethod
    def open(path: str | Path = DEFAULT_STORE, create: bool = True) -> Store:
        """Use the folder `path`: make it and check that it can be written, or only read it. Raises
        UserError: not a folder, not writable, absent (with `create=False`), or a path with control
        characters."""
        folder = Path(path).expanduser().absolute()
        _check_path(folder, path)
        if create:
            _make_writable(folder, path)
        elif not folder.is_dir():
            why = "is not a folder" if folder.exists() else "does not exist"
            raise UserError(
                f"store={path}: {why} (looked for {folder}).\n"
                "Give the folder of an earlier sweep with --store DIR."
            )
        return Store(folder)

    @property
    def mlflow_db(self) -> Path:
        """MLflow's database."""
        return self.path / "mlflow.db"

    @property
    def optuna_db(self) -> Path:
        """Optuna's database."""
        return self.path / "optuna.db"

    @property
    def artifacts(self) -> Path:
        """Folder of MLflow's artifacts."""
        return self.path / "artifacts"

    @property
    def references(self) -> Path:
        """Folder of the guard's cached references."""
        return self.path / "references"

    @property
    def caches(self) -> Path:
        """Folder of compiled code, one folder for each fingerprint."""
        return self.path / "caches"

    def study_dir(self, name: str) -> Path:
        """Folder of a study, whether it exists or not. Raises UserError: `name` is not a study
        name, or a link in its place leads elsewhere."""
        check_study_name(name)
        folder = self.path / "studies" / name
        if folder.is_symlink() and folder.resolve().parent != folder.parent.resolve():
            raise UserError(
                f"study={name!r}: {folder} is a link that leads out of its folder, to "
                f"{folder.resolve()}.\nGive the store there with store=DIR, or link the whole "
                "store instead of one study."
            )
        return folder

    def studies(self) -> list[str]:
        """Names of the studies with a header or a journal, sorted."""
        root = self.path / "studies"
        if not root.is_dir():
            return []
        return sorted(
            folder.name
            for folder in root.iterdir()
            if _STUDY_NAME.fullmatch(folder.name)
            and any((folder / file).is_file() for file in _STUDY_FILES)
        )

    def find_study(self, name: str) -> Path:
        """Folder of a study that exists. Raises UserError: no such study; says which there are."""
        check_study_name(name)
        known = self.studies()
        if name not in known:
            raise UserError(
                f"study {name!r} is not in the store {self.path}.\n{_hint(name, known)}"
            )
        return self.study_dir(name)


def find_studies(store: str | Path, names: Sequence[str]) -> list[Path]:
    """Folders of studies, each once: names in a store, or paths of studies of other stores. Raises
    UserError: no such store or study."""
    found = []
    for name in names:
        if "/" not in name:
            found.append(Store.open(store, create=False).find_study(name))
            continue
        folder = Path(name).expanduser().absolute()
        if not (folder / "journal.jsonl").is_file():
            raise UserError(
                f"{name} is no folder of a study: it has no journal.jsonl. Give the name of a "
                "study of --store, or STORE/studies/NAME of another store."
            )
        found.append(folder)
    return list(dict.fromkeys(found))


def unusable(what: str, folder: Path, error: OSError, mend: str) -> UserError:
    """The message for what the system refuses in a study's folder, or in a trial's inside it."""
    study_dir = folder.parents[1] if folder.parent.name == "trials" else folder
    made = error.filename is None or not study_dir.is_relative_to(str(error.filename))
    if isinstance(error, FileNotFoundError) and made and not (study_dir / "study.json").is_file():
        return UserError(
            f"cannot {what}: the study's folder was deleted or moved meanwhile, and what was "
            f"recorded with it.\nPut it back to {study_dir}, or start anew with the same command."
        )
    return UserError(
        f"cannot {what}: {error.strerror or error}.\nEverything recorded before is kept. {mend}, "
        "then run the same command again to continue."
    )


def sqlite_url(path: Path) -> str:
    """The URL of a sqlite file for SQLAlchemy, which decodes `%` in it. Imports SQLAlchemy."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string()


def check_study_name(name: str) -> None:
    """Refuse a name that could leave its folder or needs quoting somewhere. Raises UserError: says
    what a name may hold."""
    if _STUDY_NAME.fullmatch(name) and len(name) <= MAX_STUDY_NAME:
        return
    shown = name if len(name) <= MAX_STUDY_NAME else name[:40] + "..."
    raise UserError(
        f"study={shown!r} is not a study name: 1 to {MAX_STUDY_NAME} of the characters A-Z a-z 0-9 "
        "_ . - = , + beginning with a letter, digit or _.\n"
        "It names a folder in the store; give another store with store=DIR."
    )


def _hint(name: str, known: list[str]) -> str:
    if not known:
        return "It holds no study yet. Run a sweep first, or give another store with --store DIR."
    listed = ", ".join(known[:10]) + (f", and {len(known) - 10} more" if len(known) > 10 else "")
    return f"It holds {listed}.{near(name, known)}"


def _check_path(folder: Path, given: str | Path) -> None:
    if not str(folder).isprintable():
        raise UserError(
            f"store={str(given)!r}: a store's path may hold no control characters, which tables "
            "cannot show.\nGive another folder with store=DIR."
        )


def _make_writable(folder: Path, given: str | Path) -> None:
    """Make the folder and prove by writing that it takes files (permission bits can mislead). So it
    is with folders inside that trials write to, which may be links or mounts of their own; compiled
    code there must run, too."""
    kept = Store(folder)
    place = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = [folder / "studies", kept.references, kept.caches]
        code = kept.caches if kept.caches.exists() else folder
        for place in (folder, *(each for each in inside if each.exists())):
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"writable")
                file.flush()
                if place == code:
                    _check_executable(file.fileno(), place, given)
    except OSError as error:
        raise UserError(
            f"store={given}: cannot write there ({error.strerror or error}; {place}).\n"
            "Results and compiled code are kept in this folder, so it must be a writable one: "
            "mend it, or give another with store=DIR."
        ) from None


def _check_executable(file: int, folder: Path, given: str | Path) -> None:
    """Refuse a mount whose files cannot be mapped to run (noexec)."""
    try:
        mmap.mmap(file, 1, prot=mmap.PROT_READ | mmap.PROT_EXEC, flags=mmap.MAP_PRIVATE).close()
    except PermissionError:
        raise UserError(
            f"store={given}: code in {folder} may not run (the file system is mounted noexec).\n"
            "Compiled code of trials is kept there: give another folder with store=DIR."
        ) from None
