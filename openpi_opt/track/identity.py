"""For which code a result stands: the files of this package that its trial really imported.

A result answers as long as these files are what they were. Machine and libraries are the
fingerprint's part, values of options the configuration's. So what only declares options counts for
nothing: fields of `Options` and `Section` classes, and modules of knobs that do not act.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.paths import package_dir
from openpi_opt.result import FILES_SINCE, TrialResult
from openpi_opt.track.fingerprint import fingerprint_hash, source_hash

# Stands for every file of the package, where a trial ended before it could say which it imported.
WHOLE = "*"
# The registry of knobs stands for the order in which a trial's own knobs are applied.
_REGISTRY = "knobs/__init__.py"
OLDER = "measured by an older version of openpi_opt"
# Beside a trial's result while it runs: what it has imported so far.
FILE = "imported.json"
_DECLARING = ("Options", "Section")
_MOST_NAMED = 3
# What this process imported, as it was when that was first asked: files may be edited meanwhile.
_SEEN: dict[str, str] = {}


def imported(cfg: Config) -> dict[str, str]:
    """Files of the package that this process has imported, with 12 digits of their SHA-256. Of
    knobs only those that act in `cfg` count. Triton kernels are functions of these files."""
    acting = [knob for knob in KNOBS if knob.acts(cfg)]
    left_out = {type(knob).__module__ for knob in KNOBS} - {type(k).__module__ for k in acting}
    found = {_REGISTRY: " ".join(knob.name for knob in acting)}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] != "openpi_opt" or name in left_out or not file:
            continue
        path = Path(file).resolve()
        if path.is_relative_to(package_dir()):
            relative = path.relative_to(package_dir()).as_posix()
            if relative not in _SEEN:
                _SEEN[relative] = content_hash(path)
            found.setdefault(relative, _SEEN[relative])
    return dict(sorted(found.items()))


def note_imported(cfg: Config, folder: Path) -> None:
    """Leave `imported` in the trial's folder, for a trial that does not live to tell it."""
    temporary = folder / f".{FILE}"
    temporary.write_text(json.dumps(imported(cfg)), encoding="utf-8")
    os.replace(temporary, folder / FILE)


def noted(folder: Path) -> dict[str, str]:
    """What a trial without a result of its own had imported; the whole package if it is unknown."""
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {WHOLE: source_hash()}
    return {str(path): str(digest) for path, digest in found.items()}


def changes(result: TrialResult) -> list[str]:
    """Why a result does not answer for this package: names of changed files, or `OLDER`."""
    if result.schema_version < FILES_SINCE:
        return [OLDER]
    try:
        if _hashes(json.dumps(result.config))[0] != result.config_hash:
            return ["a default of its options"]
    except (UserError, KeyError):
        return [OLDER]
    return [path for path, digest in result.files.items() if not _is(path, digest)]


def since(result: TrialResult, newest: Mapping[str, str], older: bool) -> list[str]:
    """The same, compared with files that a later trial imported: `newest`, from `newest_files`.
    `older` says that the newest result is of a format without files."""
    if result.schema_version < FILES_SINCE:
        same = older and newest.get(WHOLE) == str(result.fingerprint.get("source_hash"))
        return [] if same else [OLDER]
    return [p for p, digest in result.files.items() if newest.get(p, digest) != digest]


def newest_files(results: Iterable[TrialResult]) -> dict[str, str]:
    """Of each file the content that the latest of `results` imported."""
    found: dict[str, str] = {}
    for result in results:
        if result.schema_version < FILES_SINCE:
            found[WHOLE] = str(result.fingerprint.get("source_hash"))
        else:
            found.update(result.files)
    found.pop(_REGISTRY, None)
    return found


def summary(changed: Iterable[list[str]]) -> str:
    """One line for the `changes` of several results, the most frequent first."""
    counts = Counter(name for names in changed for name in names)
    older = counts.pop(OLDER, 0)
    names = [name if name != WHOLE else "the package" for name, _ in counts.most_common()]
    shown = ", ".join(names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    parts = [f"{shown}{more} changed"] if names else []
    return "; ".join([*parts, *([OLDER] if older else [])])


def renewed(result: TrialResult) -> TrialResult:
    """A result of an earlier format under the hashes that its configuration has today. Until format
    3 a hash held every option, so each new one changed it. What cannot be read any more keeps its
    hashes, under which nothing finds it."""
    if result.schema_version >= FILES_SINCE:
        return result
    try:
        config_hash, context_hash = _hashes(json.dumps(result.config))
    except (UserError, KeyError):
        return result
    return result.model_copy(update={"config_hash": config_hash, "context_hash": context_hash})


def renewed_fingerprint(result: TrialResult, recorded: str) -> str:
    """The hash of a result's machine and software; formats before 3 hashed the sources, too."""
    if result.schema_version >= FILES_SINCE or not result.fingerprint:
        return recorded
    return fingerprint_hash(result.fingerprint)


def content_hash(path: Path) -> str:
    """12 hexadecimal digits of the SHA-256 of a Python file, without declarations of options."""
    stat = path.stat()
    return _content_hash(path, stat.st_mtime_ns, stat.st_size)


def _is(path: str, digest: str) -> bool:
    if path == WHOLE:
        return source_hash() == digest
    if path == _REGISTRY:
        names = digest.split()
        return [knob.name for knob in KNOBS if knob.name in names] == names
    try:
        return content_hash(package_dir() / path) == digest
    except OSError:  # removed or renamed
        return False


@lru_cache(maxsize=4096)
def _content_hash(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(_without_declarations(path.read_text("utf-8")).encode()).hexdigest()[:12]


def _without_declarations(text: str) -> str:
    """A module's text without what classes of options hold beside functions."""
    if not any(f"({name})" in text for name in _DECLARING):
        return text
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and any(
            isinstance(base, ast.Name) and base.id in _DECLARING for base in node.bases
        ):
            for number in _declared(node):
                lines[number - 1] = ""
    return "".join(lines)


def _declared(node: ast.ClassDef) -> Iterator[int]:
    """Numbers of the lines of a class that belong to no function of it."""
    assert node.end_lineno is not None
    kept: set[int] = set()
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([part.lineno, *(decorator.lineno for decorator in part.decorator_list)])
            kept |= set(range(first, (part.end_lineno or first) + 1))
    yield from (line for line in range(node.lineno, node.end_lineno + 1) if line not in kept)


@lru_cache(maxsize=65_536)
def _hashes(config: str) -> tuple[str, str]:
    cfg = Config.load(json.loads(config))
    return cfg.hash(), cfg.context_hash()
