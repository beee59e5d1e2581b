"""The towers against the implementations in transformers, with copied weights, in float32."""

import pytest
import torch
from distances import distance
from torch import Tensor, nn
from transformers import GemmaConfig as HfGemmaConfig
from transformers import GemmaModel, SiglipVisionConfig, SiglipVisionModel

from openpi_opt.pi0.config import PI0, GemmaConfig, VisionConfig
from openpi_opt.pi0.gemma import Attending, GemmaTower, rope_at, rope_frequencies
from openpi_opt.pi0.ops import Ops, Visibility, eager_attention
from openpi_opt.pi0.siglip import VisionTower

TOLERANCE = 1e-5


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, 1.5 * std, generator=generator)


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig(width=72, depth=3, heads=3, mlp_width=100, image_size=56),
        VisionConfig(width=40, depth=2, heads=5, mlp_width=33, image_size=42),
        VisionConfig(width=1152, depth=1, heads=16, mlp_width=4304),
    ],
    ids=["head_dim24", "odd", "pi0_width"],
)
def test_vision_tower_equals_transformers(config):
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            vision_use_head=False,
        )
    ).eval()
    randomise(theirs)
    ours = VisionTower(config, Ops())
    weights = {name.removeprefix("vision_model."): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    images = torch.rand(2, 3, config.image_size, config.image_size) * 2 - 1
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        assert distance(ours(images, torch.float32), expected) < TOLERANCE


GEMMAS = [
    GemmaConfig(width=40, depth=3, heads=3, kv_heads=1, head_dim=24, mlp_width=70),
    GemmaConfig(width=48, depth=2, heads=6, kv_heads=2, head_dim=10, mlp_width=33),
    GemmaConfig(width=1024, depth=1, heads=8, kv_heads=1, head_dim=256, mlp_width=4096),
]


def gemma_pair(config: GemmaConfig) -> tuple[GemmaModel, GemmaTower]:
    theirs = GemmaModel(
        HfGemmaConfig(
            vocab_size=8,
            pad_token_id=0,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            hidden_act="gelu_pytorch_tanh",
            attn_implementation="eager",
        )
    ).eval()
    randomise(theirs)
    ours = GemmaTower(config, Ops())
    weights = theirs.state_dict()
    del weights["embed_tokens.weight"]
    ours.load_state_dict(weights, strict=True)
    return theirs, ours


def theirs_on(model: GemmaModel, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states for embeddings x, free of any scaling of embeddings."""
    additive = torch.zeros(mask.shape).masked_fill(~mask, -2.3819763e38)
    return model(
        inputs_embeds=x, position_ids=positions, attention_mask=additive, use_cache=False
    ).last_hidden_state


@pytest.mark.parametrize("config", GEMMAS, ids=["mqa", "gqa", "pi0_width"])
def test_gemma_tower_equals_transformers(config):
    theirs, ours = gemma_pair(config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 19, config.width, generator=generator)
    valid = torch.rand(2, 19, generator=generator) < 0.7
    valid[:, 0] = True
    positions = valid.cumsum(1) - 1
    mask = valid[:, None, None, :].expand(2, 1, 19, 19)
    rope = rope_at(positions, rope_frequencies(config.head_dim, "float32"), torch.float32)
    with torch.no_grad():
        expected = theirs_on(theirs, x, positions, mask)
        hidden, _ = ours(x, Attending(rope, Visibility(mask, None), eager_attention))
        assert distance(ours.norm(hidden), expected) < TOLERANCE


def test_rope_frequencies_equal_transformers_and_round_to_bfloat16():
    theirs, _ = gemma_pair(GEMMAS[0])
    frequencies = rope_frequencies(GEMMAS[0].head_dim, "float32")
    assert torch.equal(frequencies, theirs.rotary_emb.inv_freq)
    exact = rope_frequencies(PI0.language.head_dim, "float32")
    rounded = rope_frequencies(PI0.language.head_dim, "bfloat16")
    assert torch.equal(rounded, exact.to(torch.bfloat16).float())
    # The largest angle error that the model sheet reports for position 531.
    assert float((531 * (rounded - exact)).abs().max()) == pytest.approx(0.74, abs=0.01)
