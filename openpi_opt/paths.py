"""Where the project's own files are, and where a user's presets are looked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """Folder of the Hydra groups: inside the package in a wheel, beside it in a checkout."""
    packaged = _PACKAGE / "conf"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "conf"


def user_conf_dir() -> Path:
    """`conf/` of the working folder, where `promote` writes presets unless told otherwise."""
    return Path.cwd() / "conf"


def package_dir() -> Path:
    """Folder of the installed `openpi_opt` package."""
    return _PACKAGE


def content_of(path: str) -> str:
    """The hash of a file's content, "sha256:..."; "unreadable:PATH" where it cannot be read."""
    try:
        return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    except OSError:
        return f"unreadable:{path}"
