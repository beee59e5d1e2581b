"""A small checkpoint in the real formats of openpi and LeRobot, its statistics and a tokenizer.

    python tests/samples/robot_samples.py FOLDER

writes FOLDER/openpi, FOLDER/lerobot and FOLDER/tokenizer.model: weights are random, the robot is
LIBERO. With --model pi05_mini it is a pi05.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from openpi_opt.pi0 import checkpoint, weights
from openpi_opt.pi0.config import MODELS

WORDS = "pick up the black bowl and put it on plate do something open drawer task state action"


def statistics(dims: int, seed: int) -> dict[str, list[float]]:
    """Mean, deviation and quantiles of `dims` dimensions."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=dims), rng.uniform(0.1, 2.0, dims)
    low, high = mean - 2 * std, mean + 2 * std
    return {"mean": [*mean], "std": [*std], "q01": [*low], "q99": [*high]}


def norm_stats(state: int = 8, actions: int = 7) -> dict[str, Any]:
    """The content of openpi's norm_stats.json."""
    return {"norm_stats": {"state": statistics(state, 1), "actions": statistics(actions, 2)}}


def tokenizer(file: Path) -> Path:
    """A small SentencePiece model with PaliGemma's special ids; any text has ids below 700."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *WORDS.split()] * 20),
        model_prefix=str(file.with_suffix("")),
        vocab_size=340,
        hard_vocab_limit=False,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    file.with_suffix(".vocab").unlink()
    return file.with_suffix(".model")


def openpi_folder(folder: Path, model: str = "pi0_mini", asset: str = "libero") -> Path:
    """As openpi's converter writes it: safetensors, config.json, assets/<asset_id>."""
    folder.mkdir(parents=True)
    policy = weights.build(MODELS[model], "cpu")
    weights.init_random(policy, 0)
    checkpoint.save(policy, folder / "model.safetensors")
    config = {"action_dim": 32, "action_horizon": 50, "precision": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    assets = folder / "assets" / "physical-intelligence" / asset
    assets.mkdir(parents=True)
    (assets / "norm_stats.json").write_text(json.dumps(norm_stats()))
    return folder


def lerobot_folder(folder: Path, model: str = "pi0_mini", mode: str = "MEAN_STD") -> Path:
    """As LeRobot saves a policy: names with a prefix, config.json, the normaliser's step."""
    folder.mkdir(parents=True)
    policy = weights.build(MODELS[model], "cpu")
    weights.init_random(policy, 0)
    tensors = {f"model.{name}": tensor for name, tensor in policy.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"type": MODELS[model].family, "dtype": "float32", "chunk_size": 50}
    (folder / "config.json").write_text(json.dumps(config))
    state_file = "policy_preprocessor_step_2_normalizer_processor.safetensors"
    step = {
        "registry_name": "normalizer_processor",
        "config": {
            "eps": 1e-8,
            "features": {"observation.state": {"type": "STATE", "shape": [8]}},
            "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        },
        "state_file": state_file,
    }
    steps = [{"registry_name": "rename_observations_processor", "config": {}}, step]
    (folder / "policy_preprocessor.json").write_text(
        json.dumps({"name": "policy_preprocessor", "steps": steps})
    )
    values = norm_stats()["norm_stats"]
    named = {"observation.state": values["state"], "action": values["actions"]}
    flat = {f"{key}.{stat}": torch.tensor(v) for key, s in named.items() for stat, v in s.items()}
    save_file(flat, folder / state_file)
    return folder


def libero(seed: int = 0, height: int = 240, width: int = 320) -> dict[str, Any]:
    """An observation as LIBERO's client sends it."""
    rng = np.random.default_rng(seed)
    return {
        "observation/image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=8).astype(np.float32),
        "prompt": "pick up the black bowl",
    }


if __name__ == "__main__":
    raw_text = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw_text)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="pi0_mini", choices=["pi0_mini", "pi05_mini"])
    arguments = parser.parse_args()
    openpi_folder(arguments.folder / "openpi", arguments.model)
    quantiles = "QUANTILES" if arguments.model == "pi05_mini" else "MEAN_STD"
    lerobot_folder(arguments.folder / "lerobot", arguments.model, quantiles)
    print(tokenizer(arguments.folder / "tokenizer.model").parent)
