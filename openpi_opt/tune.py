"""Tuning of matrix products as a workflow: `python -m openpi_opt.tune gemm preset=mi350_runbook`.

Writes the products of a configuration in the formats of AMD's tuners (aiter
`csrc/gemm_a16w16/README.md` at e4048607; `torch/cuda/tunable.py`), says how to run them, and which
products a table serves. No GPU is needed. **The tuners themselves have not been run here.**
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm.bench import contenders
from openpi_opt.errors import RefusedError, UserError
from openpi_opt.kernels.aiter_tables import (
    Product,
    merged,
    read_table,
    served,
    write_untuned,
)
from openpi_opt.machine import find_aiter, probe
from openpi_opt.space.compose import compose
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import Store
from openpi_opt.verbs import add_store, verb_parser

_UNTUNED, _TUNED = "bf16_untuned_gemm.csv", "bf16_tuned_gemm.csv"
_OFFLINE, _RESULTS = "tunableop_untuned0.csv", "tunableop_results0.csv"
# Knobs that decide which products there are; the others decide who computes them.
_SHAPING = ("simplify", "fusion", "vision")
# torch's names of 16-bit types in TunableOp's files.
_TORCH_NAMES = {"torch.bfloat16": "BFloat16", "torch.float16": "Half"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, and print products and commands; with `--run`, the tuner's exit code."""
    arguments = _parser().parse_args(argv)
    cfg = _config(arguments.what, arguments.store)
    counted = products(cfg)
    folder: Path = arguments.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_untuned(folder / _UNTUNED, counted)
        write_offline(folder / _OFFLINE, counted)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error}).") from error
    print(_text(counted, _libraries(arguments, counted)))
    for name in (_UNTUNED, _OFFLINE):
        print(f"wrote {folder / name}", file=sys.stderr)
    command = _tuner(folder)
    if arguments.run:
        return _run(command)
    print(_next(folder, command, cfg))
    return 0


def products(cfg: Config) -> Counter[Product]:
    """Products of the linear layers in one call of `cfg`, with how often each runs. Those of layers
    that a kernel of this project replaces are among them: their shapes are the same wherever they
    are computed. The knobs that fuse and simplify are applied."""
    import torch

    from openpi_opt import runtime
    from openpi_opt.knobs import BY_NAME
    from openpi_opt.pi0 import weights
    from openpi_opt.pi0.config import MODELS
    from openpi_opt.pi0.layers import Linear
    from openpi_opt.pi0.workload import make_inputs

    workload = cfg.workload
    knobs = {name: cfg.knobs[name] for name in _SHAPING}
    fusion = knobs["fusion"].model_copy(update={"expert_layer": False})
    shaped = cfg.baseline()
    shaped = shaped.model_copy(
        update={
            "knobs": {**shaped.knobs, **knobs, "fusion": fusion},
            "workload": workload.model_copy(update={"steps": 1}),
        }
    )
    policy = weights.build(MODELS[cfg.model.name], torch.device("meta"), steps=1)
    for name in _SHAPING:
        BY_NAME[name].fold(policy, shaped)
    for name in _SHAPING:
        BY_NAME[name].transform(policy, shaped)
    once: Counter[Product] = Counter()
    stepped: Counter[Product] = Counter()
    dtype = "torch.float16" if cfg.knobs["precision"].dtype == "float16" else "torch.bfloat16"  # type: ignore[attr-defined]
    expert = set(policy.expert.modules())

    def observe(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, Linear)
        rows = given[0].numel() // given[0].shape[-1]
        counter = stepped if layer in expert else once
        has_bias = layer.bias is not None
        counter[Product(rows, layer.out_features, layer.in_features, has_bias, dtype)] += 1

    for layer in policy.modules():
        if isinstance(layer, Linear):
            layer.register_forward_pre_hook(observe)
    with torch.no_grad():
        policy.sample_actions(make_inputs(runtime.workload_of(shaped), policy.config, 0, "meta"))
    for product, count in stepped.items():
        once[product] += count * workload.steps
    return once


def write_offline(path: Path, found: Counter[Product]) -> None:
    """Write products as TunableOp records them (PYTORCH_TUNABLEOP_RECORD_UNTUNED), for offline use.

    BLAS sees columns: n of its three sizes are the rows here, and the weight is the transposed one.
    """
    lines = []
    for m, n, k, bias, dtype in sorted(found):
        name = "GemmAndBiasTunableOp" if bias else "GemmTunableOp"
        lines.append(f"{name}_{_TORCH_NAMES[dtype]}_TN,tn_{n}_{m}_{k}_ld_{k}_{k}_{n}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _config(what: Sequence[str], store: str) -> Config:
    """A study's best configuration, or the one that the overrides compose."""
    if len(what) == 1 and "=" not in what[0]:
        journal = Journal.read(Store.open(store, create=False).find_study(what[0]))
        return contenders(journal.records())[0].config
    given = dict(word.partition("=")[::2] for word in what)
    preset = given.pop("preset", None)
    cfg = compose([f"{key}={value}" for key, value in given.items()], preset)
    if cfg.model.name == "auto":  # nothing runs here, so a small machine is no reason for less
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"name": "pi0"})})
    return cfg


def _libraries(
    arguments: argparse.Namespace, found: Counter[Product]
) -> dict[Product, str | None] | None:
    """By product, who computes it with the tables that there are; None: no GPU is known."""
    if arguments.gpu:
        gfx, _, count = arguments.gpu.partition(":")
        units = int(count) if count.isdecimal() else 0
    else:
        gpu = next((gpu for gpu in probe().gpus if gpu.units), None)
        gfx, units = (gpu.arch, gpu.units or 0) if gpu else ("", 0)
    if not units:
        return None
    package = find_aiter()
    try:
        if package is not None and package.kind == "amd":
            rows = merged(Path(package.location), arguments.table)
        else:
            rows = read_table(Path(arguments.table)) if arguments.table else []
    except RefusedError as error:
        raise UserError(f"--table {arguments.table}: {error.reason}.") from error
    return served(rows, gfx, units, found)


def _text(found: Counter[Product], libraries: dict[Product, str | None] | None) -> str:
    lines = [f"{'rows':>6} {'outputs':>8} {'inputs':>7} bias  calls  computed by"]
    for product, count in sorted(found.items()):
        by = "" if libraries is None else libraries[product] or "torch (no row)"
        bias = "yes" if product.bias else "no"
        lines.append(
            f"{product.m:>6} {product.n:>8} {product.k:>7} {bias:<4} {count:>6}  {by}".rstrip()
        )
    if libraries is None:
        lines.append(
            "no AMD GPU here: --gpu gfx942:304 (MI300X) or gfx950:256 (MI350) looks rows up"
        )
    else:
        hits = sum(library is not None for library in libraries.values())
        lines.append(f"aiter serves {hits} of {len(found)} products")
    return "\n".join(lines)


def _tuner(folder: Path) -> list[str]:
    """aiter's tuner; it lies in the source tree, not in the installed package."""
    package = find_aiter()
    root = Path(package.location).parent if package and package.kind == "amd" else Path("AITER")
    script = root / "csrc" / "gemm_a16w16" / "gemm_tuner.py"
    files = ["--input_file", str(folder / _UNTUNED), "--tuned_file", str(folder / _TUNED)]
    return [sys.executable, str(script), *files, "--with-hipblaslt"]


def _run(command: list[str]) -> int:
    if not Path(command[1]).is_file():
        raise UserError(
            f"--run: there is no {command[1]}.\nThe tuner is part of aiter's source tree: "
            "git clone --recursive https://github.com/ROCm/aiter, pip install -e ."
        )
    return subprocess.run(command, check=False).returncode


def _next(folder: Path, command: list[str], cfg: Config) -> str:
    offline = (
        "PYTORCH_TUNABLEOP_ENABLED=1 PYTORCH_TUNABLEOP_TUNING=1 "
        f"PYTORCH_TUNABLEOP_FILENAME={folder / 'tunableop_results.csv'} {sys.executable} -c "
        f"\"import torch; torch.cuda.tunable.tune_gemm_in_file('{folder / _OFFLINE}')\""
    )
    model = f"model={cfg.model.name} " if cfg.model.name != "pi0" else ""
    return "\n".join(
        [
            "",
            "tune on the GPU (AITER is the source tree of aiter):",
            f"  {' '.join(command)}",
            "look what it serves, then use it:",
            f"  python -m openpi_opt.tune gemm ... --table {folder / _TUNED}",
            f"  python -m openpi_opt.sweep {model}blas=aiter blas.aiter.table={folder / _TUNED}",
            "or with PyTorch's TunableOp:",
            f"  {offline}",
            f"  python -m openpi_opt.sweep {model}blas=tunableop_use "
            f"blas.tunableop.file={folder / _RESULTS}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "tune",
        description="Write the matrix products of a configuration for AMD's tuners, say how to run "
        "them, and which products a tuned table serves.",
    )
    parser.add_argument("kind", choices=("gemm",), help="what is tuned")
    parser.add_argument(
        "what",
        nargs="*",
        metavar="STUDY | preset=NAME | key=value",
        help="a study, whose best configuration is taken, or a configuration as sweep takes it",
    )
    add_store(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("tuned"), metavar="FOLDER", help="default: tuned"
    )
    parser.add_argument("--table", metavar="FILE", help="a tuned table to look products up in")
    parser.add_argument(
        "--gpu", metavar="GFX:UNITS", help="look rows up for this GPU instead of the one here"
    )
    parser.add_argument("--run", action="store_true", help="run aiter's tuner now")
    return parser


if __name__ == "__main__":
    cli.run(main)
