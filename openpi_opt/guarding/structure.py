"""What a candidate computes, apart from how it rounds: its float32 form against the reference.

Mistakes hide under the rounding of 16 bits, which moves the actions by 0.6%; honest variants in
float32 differ by 1e-6. So the same knobs are applied once more with float32 operands
(`Knob.float32_form`) and held to the tolerance of float32, on all cases, and with a second set of
weights (`weights.provoke`). Compilation and capture are left out.

Kernels of attention for 16 bits (flash and cuDNN on a GPU, aiter) and linear layers in FP8 have no
such form. They are compared call by call with their own rounding written plainly in float64. Not
end to end: a difference of 1e-7 flips some values of FP8, each by 6%.

A verdict is kept in the store, under the options that decide it, the reference and the program. A
process with code of neither this package nor an installed one makes its own check.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.guarding import reference as known
from openpi_opt.guarding.cases import Case
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.attention import STAGES as ATTENTION
from openpi_opt.machine import installed
from openpi_opt.measure import guard
from openpi_opt.measure.clock import upload
from openpi_opt.pi0 import weights
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import NOT_ALLOWED, Attention, Visibility, eager_attention
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.result import LocalCheck, StructureReport, write_atomic

if TYPE_CHECKING:
    from openpi_opt.kernels.fp8 import Fp8Linear

_PACKAGE = Path(__file__).resolve().parents[1]
PROVOKED = ("ordinary 0", "next frame")  # cases that are asked of the second set of weights
# A kernel may be so many times as far from the exact product as plain rounding of its own results.
LOCAL_FACTOR = 3.0
# Weights in FP8 may be so many times as far away as rounding them with the best scale.
FP8_FACTOR = 1.1
# Rounding to e4m3's three bits moves a number by at most 2^-4 of it; more is a scale that clips, or
# one so large that values fall below the format's range.
FP8_INPUT = 1.1 * 2**-4
LOCAL_CASES = 2


def obtain(
    cfg: Config,
    device: torch.device,
    cases: Sequence[Case],
    reference: guard.Reference,
    reference_key: str,
    folder: Path,
) -> StructureReport:
    """Make the report on the structure of `cfg` and keep it, unless another process did meanwhile.

    Making it builds policies in float32, one after the other; one process does, others wait. What a
    process with foreign code finds is not kept.
    """
    form = float32_form(cfg)
    path = _path(cfg, reference_key, folder)
    with FileLock(f"{path}.lock"):
        found = stored(cfg, reference_key, folder)
        if found is None:
            found = _checked(cfg, form, device, cases, reference, folder)
            if not foreign_code():
                write_atomic(path, found.model_dump_json(indent=1))
        gc.collect()  # judged layers refer to themselves, and hold a policy's memory
    return found


def stored(
    cfg: Config, reference_key: str, folder: Path, foreign: bool = False
) -> StructureReport | None:
    """The report that the store has on the structure of `cfg`, or None.

    `foreign` admits it in a process with foreign code: a user's program that loads a policy.
    """
    path = _path(cfg, reference_key, folder)
    if not path.exists() or (foreign_code() and not foreign):
        return None
    return StructureReport.model_validate_json(path.read_text(encoding="utf-8"))


def _path(cfg: Config, reference_key: str, folder: Path) -> Path:
    return folder / f"structure-{_key(cfg, float32_form(cfg), reference_key)}.json"


def float32_form(cfg: Config) -> Config:
    """The same structure with float32 operands; knobs may refuse it to users."""
    return cfg.model_copy(update={"knobs": {knob.name: knob.float32_form(cfg) for knob in KNOBS}})


def apply(policy: Pi0Policy, cfg: Config, form: Config, judge: Judge) -> runtime.Prepared:
    """The float32 form of `cfg` on a plain float32 policy; `judge` compares what has none."""
    prepared = runtime.apply_knobs(policy, form)
    _judge_attention(prepared.policy, cfg, judge)
    # Not imported here: a result answers as long as what its trial imported is the same.
    fp8 = sys.modules.get("openpi_opt.kernels.fp8")
    for name, module in prepared.policy.named_modules():
        if fp8 is not None and isinstance(module, fp8.Fp8Linear):
            _judge_fp8(module, _short(name), judge)
    return prepared


def _checked(
    cfg: Config,
    form: Config,
    device: torch.device,
    cases: Sequence[Case],
    reference: guard.Reference,
    folder: Path,
) -> StructureReport:
    judge = Judge(_half(cfg))
    prepared = apply(runtime.build_policy(cfg, device), cfg, form, judge)
    indices = [i for i, case in enumerate(cases) if case.admitted(prepared.policy.layout)]
    inputs = [cases[i].inputs for i in indices]
    exact = replace(reference.only(indices), plain=reference.only(indices).actions)
    call = judge.watching(prepared.call, LOCAL_CASES)
    main = guard.check(call, inputs, exact, cfg.guard, upload=lambda item: upload(item, device))
    emulated = {}
    if cfg.lossy():
        judge.emulating = True
        emulated = {
            cases[i].name: guard.distance(
                prepared.call(upload(cases[i].inputs, device)), reference.actions[i]
            ).rel_l2
            for i in indices
        }
    del prepared, call
    gc.collect()
    second = _provoked(cfg, form, device, provoking(cases), folder)
    local = judge.checks()
    report = StructureReport(
        passed=True,
        rel_l2=main.rel_l2,
        tolerance=main.tolerance,
        case=main.case or "",
        large_logits_rel_l2=second,
        local=local,
        unchecked=unchecked(cfg),
        emulated={name: rel_l2 for name, rel_l2 in emulated.items() if rel_l2 is not None},
    )
    problem = main.problem or _problem(report, main.passed, cfg.guard.floor)
    return report.model_copy(update={"passed": problem is None, "problem": problem})


def _problem(report: StructureReport, right: bool, admitted: float) -> str | None:
    if not right:
        far = "not finite" if report.rel_l2 is None else f"{report.rel_l2:.1e} from the reference"
        return (
            f"with float32 operands it is {far} ({report.case}); admitted are "
            f"{report.tolerance:.1e}: this is not rounding"
        )
    second = report.large_logits_rel_l2
    if second is None or second > admitted:
        far = "not finite" if second is None else f"{second:.1e} from the reference"
        return f"with large logits, in float32, it is {far}; admitted are {admitted:.1e}"
    for item in report.local:
        if item.rel_l2 is None or item.rel_l2 > item.tolerance:
            far = "not finite" if item.rel_l2 is None else f"{item.rel_l2:.2%}"
            return (
                f"{item.name} ({item.place}) is {far} from its own rounding; admitted are "
                f"{item.tolerance:.2%}"
            )
    return None


def unchecked(cfg: Config) -> list[str]:
    """What neither a float32 form nor an emulation stands for, with the reason."""
    found = []
    for name in ("blas", "elementwise"):
        if cfg.canonical().knobs[name].backend == "aiter":  # type: ignore[attr-defined]
            found.append(f"{name}=aiter: its kernels take 16 bits only and have no emulation here")
    return found


def _provoked(
    cfg: Config, form: Config, device: torch.device, inputs: Sequence[Inputs], folder: Path
) -> float | None:
    """The largest distance with the second weights, of how far they moved; None: not finite."""
    stored = provoked_reference(cfg, device, inputs, folder)
    call = apply(provoked_policy(cfg, device), cfg, form, Judge(_half(cfg))).call
    found = [
        guard.distance(call(upload(item, device)), actions, item.noise).rel_l2
        for item, actions in zip(inputs, stored, strict=True)
    ]
    finite = [rel_l2 for rel_l2 in found if rel_l2 is not None]
    return max(finite) if len(finite) == len(found) else None


def provoking(cases: Sequence[Case]) -> list[Inputs]:
    """The inputs that are asked of the second weights."""
    return [case.inputs for case in cases if case.name in PROVOKED]


def provoked_policy(cfg: Config, device: torch.device) -> Pi0Policy:
    """The plain float32 policy with the second weights, whatever checkpoint `cfg` names."""
    random = cfg.weights.model_copy(update={"kind": "random", "path": None})
    policy = runtime.build_policy(cfg.model_copy(update={"weights": random}), device)
    weights.provoke(policy)
    return policy


def provoked_reference(
    cfg: Config, device: torch.device, inputs: Sequence[Inputs], folder: Path
) -> list[Tensor]:
    """Actions of `provoked_policy` on inputs of the host, from the store or computed now."""
    content = hashlib.sha256()
    for tensor in itertools.chain.from_iterable(inputs):
        content.update(tensor.contiguous().numpy().tobytes())
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parts = [cfg.model.model_dump(), cfg.weights.seed, cfg.workload.steps, place]
    name = known.digest([*parts, content.hexdigest(), known.code(), torch.__version__])
    return known.kept(
        folder / f"provoked-{name}.safetensors",
        "float32",
        lambda: known.plain_actions(provoked_policy(cfg, device), inputs),
    )


@dataclass
class Judge:
    """Collects distances of operations from their own rounding; `dtype` is the candidate's.

    `emulating` lets FP8 layers compute with rounded operands, written plainly, in float32.
    """

    dtype: torch.dtype
    active: bool = False
    emulating: bool = False
    found: dict[str, list[tuple[float | None, float, str]]] = field(default_factory=dict)

    def watching(self, call: guard.Call, count: int) -> guard.Call:
        """`call`, of whose first `count` runs the operations are compared."""
        calls = 0

        def watched(inputs: Inputs) -> Tensor:
            nonlocal calls
            self.active = calls < count
            calls += 1
            return call(inputs)

        return watched

    def compare(
        self, name: str, place: str, actual: Tensor, exact: Tensor, limit: float | None = None
    ) -> None:
        """Book the distance of `actual` from the float64 `exact`.

        `limit` is what is admitted; left out it is `LOCAL_FACTOR` times what rounding the exact
        result to `dtype` does.
        """
        if limit is None:
            limit = LOCAL_FACTOR * _far(exact.to(self.dtype), exact)
        away = _far(actual, exact) if bool(actual.isfinite().all()) else None
        self.found.setdefault(name, []).append((away, limit, place))

    def checks(self) -> list[LocalCheck]:
        """One line for each kind of operation: its worst call."""

        def share(call: tuple[float | None, float, str]) -> float:
            return float("inf") if call[0] is None else call[0] / max(call[1], 1e-30)

        return [
            LocalCheck(name=name, place=place, rel_l2=away, tolerance=limit, calls=len(calls))
            for name, calls in self.found.items()
            for away, limit, place in [max(calls, key=share)]
        ]


def _far(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _half(cfg: Config) -> torch.dtype:
    """The 16-bit format of the candidate; of a candidate in float32, bfloat16."""
    name = cfg.knobs["precision"].dtype  # type: ignore[attr-defined]
    found: torch.dtype = torch.bfloat16 if name == "float32" else getattr(torch, name)
    return found


def _judge_attention(policy: Pi0Policy, cfg: Config, judge: Judge) -> None:
    knob: Any = BY_NAME["attention"]
    options = knob.of(cfg)
    for stage in knob.in_16_bits_only(cfg):
        from openpi_opt.kernels import attention as backends

        name = getattr(options, stage)
        kernel = backends.backend(name, cfg.device, stage, options.launch(stage).given())
        attend = judged_attention(f"{stage} {name}", kernel, judge)
        setattr(policy.ops, f"attention_{stage}", attend)


def judged_attention(name: str, kernel: Attention, judge: Judge) -> Attention:
    """Plain attention in float32 that compares `kernel`, in 16 bits, with the same in float64."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        if judge.active:
            low = [tensor.to(judge.dtype) for tensor in (q, k, v)]
            actual = kernel(low[0], low[1], low[2], visibility, scale)
            wide = [tensor.double() for tensor in low]
            exact, rounded = (
                _softmax_attention(wide, visibility, scale, dtype) for dtype in (None, judge.dtype)
            )
            limit = LOCAL_FACTOR * _far(rounded, exact)
            judge.compare("attention", name, actual, exact, limit)
        return eager_attention(q, k, v, visibility, scale)

    return attend


def _softmax_attention(
    qkv: Sequence[Tensor], visibility: Visibility, scale: float, dtype: torch.dtype | None
) -> Tensor:
    """Attention in float64; with `dtype` the weights and the result are rounded to it."""
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv)
    logits = q @ k.expand(-1, q.shape[1], -1, -1).transpose(2, 3) * scale
    if visibility.mask is not None:
        logits = logits.masked_fill(~visibility.mask, NOT_ALLOWED)
    share = logits.softmax(-1)
    if dtype is not None:
        share = share.to(dtype).double()
    out = (share @ v.expand(-1, q.shape[1], -1, -1)).transpose(1, 2)
    return out if dtype is None else out.to(dtype).double()


def _judge_fp8(linear: Fp8Linear, name: str, judge: Judge) -> None:
    """Let an FP8 layer compute with operands that are not rounded, and compare its product."""
    quantised: Callable[[Tensor], Tensor] = linear.forward

    def forward(x: Tensor) -> Tensor:
        if judge.emulating:
            return _plain_product(linear, x, torch.float32)
        if judge.active:
            low, bias = x.to(judge.dtype), linear.bias
            if bias is not None:
                linear.bias = torch.nn.Parameter(bias.to(judge.dtype), requires_grad=False)
            actual = quantised(low)
            linear.bias = bias
            judge.compare("fp8 product", name, actual, _plain_product(linear, low, torch.float64))
            judge.compare("fp8 weight", name, *_weights(linear))
            judge.compare("fp8 input", name, _rounded_input(linear, low), low.double(), FP8_INPUT)
        return linear.ops.linear(x, linear.weight, linear.bias)

    linear.forward = forward  # type: ignore[method-assign]


def _weights(linear: Fp8Linear) -> tuple[Tensor, Tensor, float]:
    """The weights that an FP8 layer has, those that it should have, and what rounding may do."""
    from openpi_opt.kernels.fp8 import quantise, scale_for

    exact, dtype = linear.weight.double(), linear.weight_fp8.dtype
    scale = scale_for(exact.abs().amax(), dtype)
    rounded = quantise(linear.weight, scale, dtype).double() * scale.double()
    has = linear.weight_fp8.double() * linear.weight_scale.double()
    return has, exact, FP8_FACTOR * _far(rounded, exact)


def _rounded_input(linear: Fp8Linear, x: Tensor) -> Tensor:
    """What an FP8 layer makes of its input, in float64."""
    from openpi_opt.kernels.fp8 import quantise

    scale = linear.input_scale
    return quantise(x, scale, linear.weight_fp8.dtype).double() * scale.double()


def _plain_product(linear: Fp8Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of an FP8 layer's rounded operands, in `dtype`."""
    rows = _rounded_input(linear, x).to(dtype)
    out = rows @ (linear.weight_fp8.to(dtype) * linear.weight_scale.to(dtype)).T
    return out if linear.bias is None else out + linear.bias.to(dtype)


def _short(name: str) -> str:
    """The tower and the layer's own name, without its number: one line for all layers."""
    parts = name.split(".")
    tower = next((t for t in ("vision", "language", "gemma_expert") if t in name), "projector")
    return f"{tower} {parts[-1]}"


def _key(cfg: Config, form: Config, reference_key: str) -> str:
    parts = {
        "form": form.dump()["knobs"],
        "in_16_bits": BY_NAME["attention"].of(cfg).model_dump(mode="json", include={*ATTENTION}),
        "fp8": cfg.canonical().knobs["blas"].model_dump(mode="json"),
        "dtype": str(_half(cfg)),
        "floor": cfg.guard.floor,
        "unchecked": unchecked(cfg),
        "reference": reference_key,
        "program": program_hash(),
        # Kernels that the package calls; torch's own are in the reference's key.
        "aiter": installed("amd-aiter", "aiter"),
        "cudnn": torch.backends.cudnn.version(),
    }
    return known.digest(parts)


def foreign_code() -> bool:
    """Whether this process has imported Python code of neither this package nor an installed one.

    A package is installed where its metadata lies beside it. `sitecustomize` and its like count as
    foreign wherever they lie beside installed packages. A module that torch makes, such as
    `torch.ops`, names a file that is nowhere.
    """
    real = functools.cache(os.path.realpath)
    paths = sysconfig.get_paths()
    standard, *installed = (real(paths[name]) for name in ("stdlib", "purelib", "platlib"))
    sites = [real(entry) for entry in sys.path if any(Path(entry).glob("*.dist-info"))]
    ours = tuple(f"{root}/" for root in (_PACKAGE, standard, *installed, *sites))
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None)
        if not isinstance(place, str) or not place.endswith(".py"):
            continue
        if not os.path.isabs(place) and not os.path.exists(place):
            continue
        folder, file = os.path.split(place)
        path = os.path.realpath(place) if os.path.islink(place) else f"{real(folder)}/{file}"
        if name in ("sitecustomize", "usercustomize"):  # outside a venv all lies below `standard`
            if os.path.dirname(path) != standard:
                return True
        elif not path.startswith(ours):
            return True
    return False


def program_hash() -> str:
    """Hash of this package's code that computes."""
    folders = ("pi0", "surgery", "kernels", "knobs", "guarding")
    files = [file for name in folders for file in sorted((_PACKAGE / name).rglob("*.py"))]
    return known.hash_of([*files, _PACKAGE / "measure" / "guard.py", _PACKAGE / "runtime.py"])
