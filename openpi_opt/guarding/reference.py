"""The guard's reference: actions of the plain eager policy in float32, kept in the store.

It is found by what it was computed from: the policy's code, model, workload, cases, device, torch,
and the *content* of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpi_opt import pi0
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.guarding import cases as asked
from openpi_opt.measure.clock import upload
from openpi_opt.measure.guard import Reference, distance
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.result import write_atomic

_TF32 = "+tf32"
_DIGESTS = "digests.json"
# A file whose status changed so shortly before it was hashed may have changed again since, within
# the resolution of the clock that stamps it.
_RACY_NS = 2_000_000_000
_CHUNK = 1 << 24


def obtain(
    policy: Pi0Policy,
    cases: Sequence[asked.Case],
    timed: Sequence[Inputs],
    cfg: Config,
    arch: str,
    folder: Path,
) -> Reference:
    """The reference for `cfg`, from the store or computed now with `policy`.

    `policy` is freshly built in float32 and plain; it is cast to the candidate's precision when
    the plain actions of that precision are missing (then build another: knobs start from float32).
    One process computes, others wait for it.

    Raises RefusedError: the plain policy overflows in this precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key(cfg, arch, folder)}.safetensors"
    plain = _plain_name(cfg)
    inputs = {"float32": [*(case.inputs for case in cases), *timed]}
    inputs.setdefault(plain, [case.inputs for case in cases])

    def answered(name: str) -> list[Tensor]:
        cast(policy, getattr(torch, name.removesuffix(_TF32)))
        return plain_actions(policy, inputs[name], name.endswith(_TF32))

    known = {name: kept(path, name, partial(answered, name)) for name in inputs}
    count = len(cases)
    found = Reference(
        actions=known["float32"][:count],
        plain=known[plain][:count],
        timed=known["float32"][count:],
        names=[case.name for case in cases],
        ordinary=sum(case.ordinary for case in cases),
    )
    _require_finite(found, plain)
    return found


def kept(path: Path, name: str, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The tensors of a name in a file of the store, computed and added where they are missing."""
    with FileLock(f"{path}.lock"):
        known = load_file(path) if path.exists() else {}
        if f"{name}/0" not in known:
            known |= {f"{name}/{i}": tensor for i, tensor in enumerate(compute())}
            save_file(known, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    count = sum(key.startswith(f"{name}/") for key in known)
    return [known[f"{name}/{i}"] for i in range(count)]


def _require_finite(reference: Reference, plain: str) -> None:
    for name, actions in (("float32", reference.actions), (plain, reference.plain)):
        bad = [
            case
            for case, found in zip(reference.names, actions, strict=True)
            if distance(found, found).rel_l2 is None
        ]
        if bad:
            wider = "; use precision=bfloat16, which has the range of float32"
            raise RefusedError(
                "invalid",
                f"the plain eager policy itself returns NaN or infinity in {name} with these "
                f"weights ({', '.join(bad[:3])}), so nothing can be compared with it"
                + (wider if name == "float16" else ""),
            )


def _plain_name(cfg: Config) -> str:
    """The precision of the plain policy. TF32 decides only where the towers are float32."""
    options: Any = cfg.canonical().knobs["precision"]
    return options.dtype + (_TF32 if options.tf32 and options.dtype == "float32" else "")


def plain_actions(policy: Pi0Policy, inputs: Sequence[Inputs], tf32: bool = False) -> list[Tensor]:
    """Actions of `policy` on inputs of the host, one after the other, back on the host."""
    with torch.inference_mode(), float32_products(tf32):
        return [
            policy.sample_actions(upload(item, policy.device)).cpu().contiguous() for item in inputs
        ]


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """float32 products with or without TF32, whatever the process has set."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def key(cfg: Config, arch: str, folder: Path) -> str:
    """What the reference depends on, 24 hexadecimal digits; `folder` keeps hashes of big files."""
    context: dict[str, Any] = cfg.context()
    del context["measure"]
    context["weights"].pop("path", None)
    recorded = cfg.guard.observations
    parts = {
        "context": {**context, "guard": cfg.guard.inputs},
        "arch": arch,
        "torch": torch.__version__,
        "weights": weights_identity(cfg, folder),
        "observations": None if recorded is None else content_hash(Path(recorded), folder),
        "code": code(),
    }
    return digest(parts)


def digest(parts: object) -> str:
    """24 hexadecimal digits for anything that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def weights_identity(cfg: Config, folder: Path) -> list[list[str]]:
    """Names and content of the checkpoint's files; empty for random weights."""
    if cfg.weights.path is None:
        return []
    path = Path(cfg.weights.path)
    files = sorted(path.glob("*.safetensors*")) if path.is_dir() else [path]
    return [[file.name, content_hash(file, folder)] for file in files]


def content_hash(file: Path, folder: Path) -> str:
    """SHA-256 of a file, from `folder`'s cache where inode, size and both times are the same.

    The time of the status change is one that no program sets: content that was replaced in place,
    with the old time of modification restored, is hashed again.
    """
    status = file.stat()
    name = str(file.resolve())
    known = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    cache = folder / _DIGESTS
    with FileLock(f"{cache}.lock"):
        entries = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
        entry = entries.get(name)
        if entry is not None and entry["status"] == known and not entry["racy"]:
            return str(entry["sha256"])
        now = time.time_ns()
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
        racy = max(status.st_mtime_ns, status.st_ctime_ns) > now - _RACY_NS
        entries[name] = {"status": known, "sha256": content.hexdigest(), "racy": racy}
        write_atomic(cache, json.dumps(entries, indent=1))
    return content.hexdigest()


def code() -> str:
    """Hash of what computes a reference: the policy, and what is asked."""
    return hash_of([*sorted(Path(pi0.__file__).parent.glob("*.py")), Path(asked.__file__)])


def hash_of(files: Iterable[Path]) -> str:
    """SHA-256 of the content of files, one after the other."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
