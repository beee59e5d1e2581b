"""Reading and writing weights as openpi's PyTorch code and LeRobot store them (safetensors only).

Loading is strict: every tensor of the file must find its place with the right shape and every place
must be filled, otherwise nothing is changed and the error names the tensors. A tensor that holds
NaN or infinity ends the loading, too; the policy is then filled in part.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from openpi_opt.checkpoint_file import CheckpointError, files, some
from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.policy import Pi0Policy

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_PALIGEMMA = "paligemma_with_expert.paligemma."
TIED = _PALIGEMMA + "lm_head.weight"
EMBEDDING = _PALIGEMMA + "model.language_model.embed_tokens.weight"
# LeRobot up to 0.3 nested PaliGemma as transformers did before 4.52.
LEGACY_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
# transformers 5 has no level `vision_model` in PaliGemma's tower.
NEWER_VISION = re.compile(
    r"(paligemma_with_expert\.paligemma\.(?:model\.)?vision_tower\.)"
    r"(?=(?:embeddings|encoder|post_layernorm)\.)"
)
# LeRobot up to 0.3 stored its data set's statistics with the policy, which they are no part of.
LEGACY_STATISTICS = re.compile(
    r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_\w+\.(mean|std|min|max)"
)
# What only one of the two has; files say nothing else of what they are.
FAMILY_NAMES = {
    "pi0": re.compile(r"state_proj\.|action_time_mlp_(in|out)\."),
    "pi05": re.compile(r"time_mlp_(in|out)\.|.*layernorm\.dense\.|.*\.norm\.dense\."),
}


class Entry(NamedTuple):
    """One tensor of a checkpoint file, known from the header only."""

    file: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str


def load(policy: Pi0Policy, path: str | os.PathLike[str]) -> None:
    """Fill `policy` from a safetensors file, a sharded index, or a folder with one of them.

    Values are cast to the dtype of the policy's parameters, so load before `precision.cast`.
    Tensors are copied one by one; the model is never in memory twice. Raises CheckpointError.
    """
    path = Path(path)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in files(path)}
        entries = _resolve(path, handles)
        targets = policy.state_dict()
        _check_family(path, entries, policy.config)
        _check(path, entries, {name: tuple(target.shape) for name, target in targets.items()})
        for name, entry in entries.items():
            targets[name].copy_(_read(handles[entry.file], entry))
            _check_finite(path, entry, targets[name])


def save(policy: Pi0Policy, path: str | os.PathLike[str]) -> None:
    """Write the weights to the file `path` under openpi's names, in the dtypes they have.

    The file appears complete or not at all.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        # The second entry is how safetensors notes that openpi's model ties the two names.
        save_file(tensors, temporary, metadata={"format": "pt", EMBEDDING: TIED})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}).\n"
            "It may be truncated or a placeholder of a large-file store; download it again."
        ) from error


def _read(handle: Any, entry: Entry) -> torch.Tensor:
    try:
        tensor: torch.Tensor = handle.get_tensor(entry.stored_name)
        return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.stored_name} cannot be read ({error})."
        ) from error


def _check_finite(path: Path, entry: Entry, loaded: torch.Tensor) -> None:
    """Raise CheckpointError for values that are not finite."""
    # The sum needs no memory, and finite values whose sum overflows are looked at one by one.
    if bool(loaded.sum().isfinite()) or bool(loaded.isfinite().all()):
        return
    wrong = int((~loaded.isfinite()).sum())
    raise CheckpointError(
        f"{path}: tensor {entry.stored_name} holds NaN or infinity in {wrong} of {loaded.numel()} "
        "values. The checkpoint is damaged; take another one."
    )


def openpi_name(stored: str) -> str | None:
    """The name that openpi gives to a stored tensor; None for data-set statistics to ignore."""
    if LEGACY_STATISTICS.fullmatch(stored):
        return None
    name = NEWER_VISION.sub(r"\1vision_model.", stored.removeprefix("model."))
    for old, new in LEGACY_NAMES.items():
        if name.startswith(_PALIGEMMA + old):
            return _PALIGEMMA + new + name.removeprefix(_PALIGEMMA + old)
    return name


def _resolve(path: Path, handles: Mapping[Path, Any]) -> dict[str, Entry]:
    """Every stored tensor by its openpi name, the tied pair under the stored one's name."""
    entries: dict[str, Entry] = {}
    for file, handle in handles.items():
        for stored in handle.keys():  # noqa: SIM118 - a file handle is no mapping
            name = openpi_name(stored)
            if name is None:
                continue
            if name in entries:
                raise CheckpointError(
                    f"{path} holds {name} twice: as {entries[name].stored_name} in "
                    f"{entries[name].file.name} and as {stored} in {file.name}."
                )
            part = handle.get_slice(stored)
            entries[name] = Entry(file, stored, tuple(part.get_shape()), part.get_dtype())
    # LeRobot's fine-tuned files may hold both, untied; its forward pass reads the embedding.
    if EMBEDDING in entries:
        entries[TIED] = entries.pop(EMBEDDING)
    return entries


def _check_family(path: Path, entries: Mapping[str, Entry], config: Pi0Config) -> None:
    """Raise CheckpointError for a checkpoint of the other family."""
    for family, pattern in FAMILY_NAMES.items():
        found = [name for name in entries if pattern.match(name)]
        if found and family != config.family:
            raise CheckpointError(
                f"{path} is a {family} checkpoint (it has {found[0]}), and {config.name} is a "
                f"{config.family} policy. Choose model={family}."
            )


def _check(path: Path, entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `entries` fill `shapes` exactly."""
    known = {name: entry for name, entry in entries.items() if name in shapes}
    wrong = {
        "missing": [name for name in shapes if name not in entries],
        "unexpected": [e.stored_name for name, e in entries.items() if name not in shapes],
        "of another shape": [
            f"{entry.stored_name} {list(entry.shape)} instead of {list(shapes[name])}"
            for name, entry in known.items()
            if entry.shape != shapes[name]
        ],
        "of a type that is no float": [
            f"{e.stored_name} {e.dtype}" for e in known.values() if e.dtype not in FLOATS
        ],
    }
    if any(wrong.values()):
        said = [f"{len(names)} {what}{some(names)}" for what, names in wrong.items() if names]
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(said)}.")
