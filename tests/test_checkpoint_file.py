import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from openpi_opt.checkpoint_file import family, inspect
from openpi_opt.errors import UserError

TENSORS = {"state_proj.weight": torch.ones(3, 4), "state_proj.bias": torch.zeros(5)}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def test_a_file_and_its_folder_are_accepted(good):
    assert inspect(str(good)) == str(good)
    assert inspect(str(good.parent)) == str(good.parent)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path, suffix):
    path = tmp_path / f"pytorch_model{suffix}"
    path.touch()
    with pytest.raises(UserError, match="loading one can run any code"):
        inspect(str(path))
    with pytest.raises(UserError, match=f"pytorch_model{suffix} is a pickle"):
        inspect(str(tmp_path))


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(UserError, match=r"'\.npz'; allowed are \.safetensors"):
        inspect(str(tmp_path / "weights.npz"))
    with pytest.raises(UserError, match="does not exist"):
        inspect(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        inspect(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=1))
def test_a_truncated_file_never_passes(good, cut):
    data = good.read_bytes()
    part = good.parent / "part.safetensors"
    part.write_bytes(data[: len(data) - 1 - cut % len(data)])
    with pytest.raises(UserError, match=r"truncated|damaged"):
        inspect(str(part))


@given(junk=st.binary(max_size=64))
def test_junk_never_passes(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    path.write_bytes(junk)
    with pytest.raises(UserError):
        inspect(str(path))


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    weight_map = {}
    for number, name in enumerate(TENSORS, 1):
        weight_map[name] = f"model-{number:05}-of-00002.safetensors"
        save_file({name: TENSORS[name]}, folder / weight_map[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_what_an_index_names_is_looked_at_and_nothing_else(tmp_path):
    index = sharded(tmp_path)
    save_file({"time_mlp_in.bias": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"cut")
    assert inspect(str(index)) == str(index)
    assert inspect(str(tmp_path)) == str(tmp_path)
    assert family(str(tmp_path)) == family(str(index)) == "pi0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is no index") for text in ("[]", "{}", '{"weight_map": 3}')),
        ("", "cannot be read as JSON"),
        ('{"weight_map": {}}', "names 0 shards"),
        ('{"weight_map": {"a": "x.safetensors"}}', r"1 are missing: x\.safetensors"),
        *(
            (json.dumps({"weight_map": {"a": shard}}), "beside it")
            for shard in ("../model.safetensors", "/etc/passwd", "model.bin")
        ),
    ],
)
def test_a_broken_index_is_refused(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=rf"index\.json.*{words}"):
        inspect(str(tmp_path))


def wide() -> bytes:
    """A header of 27 MB: 300,000 tensors."""
    item = b'{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[0,4],"more":"%s"}' % (b"." * 16)
    text = b"{" + b",".join(b'"t%d":%s' % (n, item) for n in range(300_000)) + b"}"
    return headed(text)


def headed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def large_index() -> bytes:
    text = ",".join(f'"{number}":"x"' for number in range(3_000_000))
    return f'{{"weight_map":{{{text}}}}}'.encode()


def named(*names: str) -> bytes:
    return save({name: torch.zeros(2) for name in names})


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
JAX = r"convert_jax_model_to_pytorch\.py"
LORA = "base_model.model.state_proj.lora_A.weight", "state_proj.weight"
# Files by name, a folder for None, and what is said of them.
FOREIGN: dict[str, tuple[dict[str, Callable[[], bytes] | None], str]] = {
    "wide": ({MODEL: wide}, r"a header of 27 MB"),
    "deep": ({MODEL: lambda: headed(b'{"a":' + b"[" * 2_000_000)}, r"not a safetensors file"),
    "deep_index": ({INDEX: lambda: b'{"weight_map":' * 200_000}, r"cannot be read as JSON"),
    "large_index": ({INDEX: large_index}, r"cannot be read as JSON: over 8 MB"),
    "jax": ({"params": None, "_CHECKPOINT_METADATA": bytes}, JAX),
    "jax_parameters": ({"_METADATA": bytes, "manifest.ocdbt": bytes}, JAX),
    "adapter": (
        {"adapter_config.json": bytes, "adapter_model.safetensors": bytes}, r"merge_and_unload"
    ),
    "lora": ({MODEL: lambda: named(*LORA)}, r"merge_and_unload"),
    "transformers": (
        {MODEL: lambda: named("model.vlm.lm_head.weight", "embed_action_time.x")},
        r"own PI0 classes",
    ),
    "other": (
        {MODEL: lambda: named("model.layers.0.self_attn.q_proj.weight")},
        r"no tensor of a Pi0 policy",
    ),
    "placeholder": ({MODEL: lambda: LFS}, r"git lfs pull"),
    "run": ({"pretrained_model": None}, r"Give its folder"),
}  # fmt: skip


def make(folder: Path, kind: str) -> None:
    for name, content in FOREIGN[kind][0].items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content())


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_comes_from_elsewhere_is_told_in_few_lines(tmp_path, kind):
    make(tmp_path, kind)
    with pytest.raises(UserError, match=FOREIGN[kind][1]) as caught:
        inspect(str(tmp_path))
    assert str(caught.value).count("\n") < 3
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["wide", "large_index"])
def test_a_large_file_takes_little_memory(tmp_path, kind):
    make(tmp_path, kind)
    code = f"""
from pathlib import Path
from openpi_opt.checkpoint_file import CheckpointError, inspect
try:
    inspect({str(tmp_path)!r})
except CheckpointError:
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(peak.stdout) < 100_000  # KiB


def test_one_shard_is_no_checkpoint(tmp_path):
    sharded(tmp_path)
    with pytest.raises(UserError, match="one shard of a checkpoint; give its folder"):
        inspect(str(tmp_path / "model-00001-of-00002.safetensors"))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="its shards lack their index"):
        inspect(str(tmp_path))
