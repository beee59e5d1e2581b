"""A look at a checkpoint's files without torch, so that a bad path fails before a trial starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from openpi_opt.errors import UserError

_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
Family = Literal["pi0", "pi05"]
RopeFrequencies = Literal["bfloat16", "float32"]
_LARGEST_HEADER = 100_000_000  # the format's own limit in bytes


def inspect(given: str) -> str:
    """Absolute path of a readable, complete safetensors checkpoint (file or folder).

    Raises:
        UserError: missing, unreadable, truncated, or a format that may run code when loaded.
    """
    path = Path(given).expanduser().absolute()
    if path.suffix in _PICKLES:
        raise UserError(
            f"weights.path={given}: {path.suffix} files are pickles, which can run code when "
            "loaded. Convert it to safetensors and give that file."
        )
    for file in _files(path, given):
        _check_complete(file)
    return str(path)


def family(given: str) -> Family:
    """What the checkpoint that `inspect` admits holds: pi05 has an MLP of the time alone.

    openpi and LeRobot give it the same name, LeRobot with the prefix `model.`.

    Raises:
        UserError: as `inspect`.
    """
    names = [name for file in _files(Path(given), given) for name in _header(file)[1]]
    found = any(name.removeprefix("model.").startswith("time_mlp_in.") for name in names)
    return "pi05" if found else "pi0"


def shape(given: str, name: str) -> tuple[int, ...]:
    """Of the tensor that openpi calls `name`, in a checkpoint that `inspect` admits.

    Raises:
        UserError: as `inspect`, and for a checkpoint without it.
    """
    for file in _files(Path(given), given):
        for stored, item in _header(file)[1].items():
            if stored.removeprefix("model.") == name:
                return tuple(item["shape"])
    raise UserError(f"{given} has no tensor {name}; it is no checkpoint of pi0 or pi05.")


def rope_frequencies(given: str) -> RopeFrequencies:
    """How the code that made the checkpoint `inspect` admits keeps its rotary frequencies.

    openpi's PyTorch casts them with the rest to bfloat16, always. LeRobot does in its bfloat16
    mode, and its default is float32; its files have names with the prefix `model.`, or a
    config.json with a `type` beside them, which says the `dtype`.

    Raises:
        UserError: as `inspect`.
    """
    path = Path(given)
    settings = _settings(path if path.is_dir() else path.parent)
    names = [name for file in _files(path, given) for name in _header(file)[1]]
    lerobot = "type" in settings or any(name.startswith("model.") for name in names)
    return "float32" if lerobot and settings.get("dtype") != "bfloat16" else "bfloat16"


def _settings(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint's folder; empty where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no JSON object; it is no checkpoint's configuration.")
    return settings


def _files(path: Path, given: str) -> list[Path]:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = sorted(path.glob("*.safetensors")) if index.exists() else []
        files = files or [path / "model.safetensors"]
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"weights.path={given}: {file} does not exist. Give a .safetensors file, or a "
                "folder with model.safetensors in it."
            )
    return files


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of the file that the header announces, and what it says of each tensor, by name."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        tensors = {name: item for name, item in header.items() if name != "__metadata__"}
        return 8 + length + max(item["data_offsets"][1] for item in tensors.values()), tensors
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is not a safetensors file, or is damaged at its start.") from error


def _check_complete(file: Path) -> None:
    """Compare the size that the header announces with the file's."""
    announced, _ = _header(file)
    actual = file.stat().st_size
    if actual != announced:
        raise UserError(
            f"{file} is truncated or damaged: {actual} bytes, {announced} announced in its header. "
            "Copy it again."
        )
