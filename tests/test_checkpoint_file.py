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
from safetensors.torch import save_file

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


def with_header(file: Path, text: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def wide(folder: Path) -> None:
    """A header of 27 MB: 300,000 tensors."""
    item = b'{"dtype":"F32","shape":[1,1,1,1],"data_offsets":[0,4],"more":"%s"}' % (b"." * 16)
    text = b"{" + b",".join(b'"t%d":%s' % (n, item) for n in range(300_000)) + b"}"
    with_header(folder / "model.safetensors", text)


def deep(folder: Path) -> None:
    with_header(folder / "model.safetensors", b'{"a":' + b"[" * 2_000_000)


def deep_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_bytes(b'{"weight_map":' * 200_000)


def large_index(folder: Path) -> None:
    text = ",".join(f'"{number}":"x"' for number in range(3_000_000))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{text}}}}}')


def jax(folder: Path) -> None:
    (folder / "params").mkdir()
    (folder / "_CHECKPOINT_METADATA").touch()


def jax_parameters(folder: Path) -> None:
    (folder / "_METADATA").touch()
    (folder / "manifest.ocdbt").touch()


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").touch()
    (folder / "adapter_model.safetensors").touch()


def placeholder(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def named(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        save_file({name: torch.zeros(2) for name in names}, folder / "model.safetensors")

    return make


FOREIGN = {
    "wide": (wide, r"a header of 27 MB"),
    "deep": (deep, r"not a safetensors file"),
    "deep_index": (deep_index, r"cannot be read as JSON"),
    "large_index": (large_index, r"cannot be read as JSON: over 8 MB"),
    "jax": (jax, r"convert_jax_model_to_pytorch\.py"),
    "jax_parameters": (jax_parameters, r"convert_jax_model_to_pytorch\.py"),
    "adapter": (adapter, r"merge_and_unload"),
    "lora": (
        named("base_model.model.state_proj.lora_A.weight", "state_proj.weight"),
        r"merge_and_unload",
    ),
    "transformers": (named("model.vlm.lm_head.weight", "embed_action_time.x"), r"own PI0 classes"),
    "other": (named("model.layers.0.self_attn.q_proj.weight"), r"no tensor of a Pi0 policy"),
    "placeholder": (placeholder, r"git lfs pull"),
    "run": (lambda folder: (folder / "pretrained_model").mkdir(), r"Give its folder"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_comes_from_elsewhere_is_told_in_few_lines(tmp_path, kind):
    make, words = FOREIGN[kind]
    make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        inspect(str(tmp_path))
    assert str(caught.value).count("\n") < 3
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["wide", "large_index"])
def test_a_large_file_takes_little_memory(tmp_path, kind):
    FOREIGN[kind][0](tmp_path)
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
