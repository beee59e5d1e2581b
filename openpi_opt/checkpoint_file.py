"""Which files and names make up a checkpoint, without torch, so that a bad one fails at once.

Both the look before a trial starts and the loader (`pi0.checkpoint`) take the files from here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openpi_opt.errors import UserError
from openpi_opt.pi0.config import Family, RopeFrequencies

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
# In bytes, of a header or a JSON beside it. Those of Pi0 have 0.2 MB; the format admits 100 MB,
# which take a gigabyte to parse.
_LARGEST_TEXT = 8_000_000
_OWN_NAMES = re.compile(r"(model\.)?(paligemma_with_expert|state_proj|action_\w+|time_mlp_\w+)\.")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_CONVERTER = "openpi's examples/convert_jax_model_to_pytorch.py"
# Folders and files of other formats, with what makes a readable checkpoint of them.
_FOREIGN = {
    "adapter_config.json": "a LoRA adapter. Merge it into its base model (PEFT: "
    "`merge_and_unload()`, then `save_pretrained`)",
    "_METADATA": f"JAX parameters (orbax). Convert their folder with {_CONVERTER}",
    "_CHECKPOINT_METADATA": f"a JAX checkpoint (orbax). Convert it with {_CONVERTER}",
    "params": f"a JAX checkpoint (orbax). Convert it with {_CONVERTER}",
    "pretrained_model": "a training run of LeRobot. Give its folder pretrained_model",
}


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be loaded, with the reason and what to do."""


def inspect(given: str) -> str:
    """Absolute path of a readable, complete safetensors checkpoint (file, index or folder). Raises
    CheckpointError: missing, unreadable, truncated, of another model, or a format that may run code
    when loaded."""
    path = Path(given).expanduser().absolute()
    names: list[str] = []
    for file in files(path):
        announced, tensors = _header(file)
        names += tensors
        actual = file.stat().st_size
        if actual != announced:
            raise CheckpointError(
                f"{file} is truncated or damaged: {actual} bytes, {announced} announced in its "
                "header. Copy it again."
            )
    _check_names(path, names)
    return str(path)


def files(path: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint at `path`. Raises CheckpointError: there
    are none, or something of another format."""
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle file; loading one can run any code it contains.\n"
            "Only safetensors are read: convert it with safetensors.torch.save_file."
        )
    if path.is_dir():
        return _files_of_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist or is no file; give a .safetensors file or its folder on this "
            "machine."
        )
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} has the ending {path.suffix!r}; allowed are .safetensors, "
            f"a {INDEX}, or a folder with {FILE}."
        )
    shard = _SHARD.fullmatch(path.name)
    if shard and (path.parent / f"{shard[1]}.safetensors.index.json").is_file():
        raise CheckpointError(f"{path} is one shard of a checkpoint; give its folder.")
    return [path]


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / FILE).is_file():
        return [folder / FILE]
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}.") from error
    foreign = next((text for name, text in _FOREIGN.items() if name in names), None)
    if foreign:
        raise CheckpointError(
            f"{folder} is {foreign}.\nRead are {FILE}, {INDEX}, or a folder with one of them."
        )
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    hint = f"; {pickles[0]} is a pickle file, which is not read" if pickles else ""
    hint = "; its shards lack their index" if any(map(_SHARD.fullmatch, names)) else hint
    raise CheckpointError(f"{folder} holds neither {FILE} nor {INDEX}{hint}.")


def _shards(index: Path) -> list[Path]:
    """The files that a sharded checkpoint's index names, all beside it."""
    try:
        names = set(_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of a sharded checkpoint ({type(error).__name__}: {error}); "
            'it must be JSON with a "weight_map" from tensors to files.'
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix in PICKLES:
            raise CheckpointError(
                f"{index} names the shard {str(name)[:80]!r}; shards must be .safetensors files "
                "beside it."
            )
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing or not names:
        raise CheckpointError(
            f"{index} names {len(names)} shards, of which {len(missing)} are missing"
            f"{some(missing)}. Download the checkpoint again."
        )
    return [index.parent / name for name in sorted(names)]


def _check_names(path: Path, names: list[str]) -> None:
    """Raise CheckpointError for tensors of something else than a policy in openpi's layout."""
    lora = next((name for name in names if re.search(r"\.lora_|^lora_|\.base_layer\.", name)), None)
    if lora:
        raise CheckpointError(
            f"{path} has tensors of LoRA ({lora[:80]}).\nMerge them into the base model first "
            "(PEFT: `merge_and_unload()`, then `save_pretrained`)."
        )
    if any(_OWN_NAMES.match(name) for name in names):
        return
    kind = "no tensor of a Pi0 policy"
    if any(re.match(r"(model\.)?(vlm|dit)\.|embed_action_time\.", name) for name in names):
        kind = "the names of transformers' own PI0 classes"
    raise CheckpointError(
        f"{path} has {kind} ({(names[0] if names else 'it is empty')[:80]}).\n"
        "Give a checkpoint in the layout of openpi's PyTorch code or of LeRobot."
    )


def some(names: Iterable[str], limit: int = 3) -> str:
    """': a, b, c, ...' for a message; empty for no names."""
    names = list(names)
    if not names:
        return ""
    return ": " + ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def family(given: str) -> Family:
    """The family of a checkpoint that `inspect` admits: only pi05 has an MLP of the time alone.
    openpi and LeRobot give it the same name, LeRobot with the prefix `model.`. Raises
    CheckpointError: as `inspect`."""
    names = (name.removeprefix("model.") for name in _tensors(given))
    return "pi05" if any(name.startswith("time_mlp_in.") for name in names) else "pi0"


def shape(given: str, name: str) -> tuple[int, ...]:
    """The shape of the tensor that openpi calls `name`, in a checkpoint that `inspect` admits.
    Raises CheckpointError: as `inspect`, and for a checkpoint without it."""
    tensors = _tensors(given)
    item = tensors.get(name) or tensors.get(f"model.{name}")
    if item is None:
        raise CheckpointError(f"{given} has no tensor {name}; it is no checkpoint of pi0 or pi05.")
    return tuple(item["shape"])


def rope_frequencies(given: str) -> RopeFrequencies:
    """How the code that made the checkpoint `inspect` admits keeps its rotary frequencies.

    openpi's PyTorch casts them with the rest to bfloat16, always. LeRobot does in its bfloat16
    mode, and its default is float32; its files have names with the prefix `model.`, or a
    config.json with a `type` beside them, which says the `dtype`.

    Raises CheckpointError: as `inspect`.
    """
    settings = _settings(given)
    lerobot = "type" in settings or any(name.startswith("model.") for name in _tensors(given))
    return "float32" if lerobot and settings.get("dtype") != "bfloat16" else "bfloat16"


def horizon(given: str) -> int | None:
    """Actions of a chunk that the checkpoint was trained to give, where its config.json says so.
    openpi calls them `action_horizon`, LeRobot `chunk_size`. Raises CheckpointError: a config.json
    that cannot be read."""
    settings = _settings(given)
    found = settings.get("action_horizon", settings.get("chunk_size"))
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _tensors(given: str) -> dict[str, Any]:
    """What the headers say of each tensor, by its name in the files."""
    headers = [_header(file)[1] for file in files(Path(given))]
    return {name: item for header in headers for name, item in header.items()}


def _settings(given: str) -> dict[str, Any]:
    """The config.json in or beside a checkpoint; empty where there is none."""
    path = Path(given)
    file = (path if path.is_dir() else path.parent) / "config.json"
    settings = _json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds no JSON object; it is no checkpoint's configuration.")
    return settings


def _json(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST_TEXT + 1)
        if len(text) > _LARGEST_TEXT:
            raise ValueError(f"over {_LARGEST_TEXT / 1e6:.0f} MB")
        return json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}.") from error


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of the file that the header announces, and what it says of each tensor, by name."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if not 2 <= length <= file.stat().st_size:
                raise ValueError("no header")
            if length > _LARGEST_TEXT:
                raise CheckpointError(
                    f"{file} has a header of {length / 1e6:.0f} MB; one of Pi0 has 0.2 MB, and "
                    f"{_LARGEST_TEXT / 1e6:.0f} MB are read. Save it again without its metadata."
                )
            header = json.loads(stream.read(length))
        tensors = {name: item for name, item in header.items() if name != "__metadata__"}
        for item in tensors.values():
            if not all(isinstance(size, int) for size in item["shape"]):
                raise ValueError("no shape")
        ends = [int(item["data_offsets"][1]) for item in tensors.values()]
        return 8 + length + max(ends, default=0), tensors
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except CheckpointError:
        raise
    except (RecursionError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        hint = "is not a safetensors file, or is damaged at its start"
        if start == b"version ":
            hint = "is a placeholder of Git LFS; fetch the file itself with `git lfs pull`"
        raise CheckpointError(f"{file} {hint}.") from error
