"""Parity with diffusers' guiders and with its perturbed attention.

diffusers is a reference here and nothing else. Its guiders combine any tensors; the rules of
sfumato work on x0 (rescale, project) or on the velocity (zero_star).
"""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import guiders
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from torch import Tensor

from helpers.models import randomised
from helpers.tensors import normal
from sfumato.predict.guidance.moment import Moment
from sfumato.predict.guidance_models._layer_replacement import replace_layers
from sfumato.predict.guidance_models.perturbed_attention import self_attentions
from sfumato.predict.guidance_models.skip_layers import branches
from sfumato.predict.networks.unet import UNet, UNetConfig
from sfumato.registry import find
from sfumato.types import Conditioning, Prediction

POINT = (0.6, 0.4)
SCALES = pytest.mark.parametrize("w", [0.0, 1.5, 7.5])


def predictions(count: int, seed: int = 0) -> tuple[Tensor, list[Prediction]]:
    alpha, sigma = POINT
    x = normal(3, 4, 6, 5, seed=seed)
    velocities = [0.3 * x + normal(3, 4, 6, 5, seed=seed + k + 1) for k in range(count)]
    return x, [
        Prediction((x - sigma * v) / (alpha + sigma), (x + alpha * v) / (alpha + sigma))
        for v in velocities
    ]


def begun(name: str, **options: Any) -> Callable[..., Prediction]:
    join = find("predict.guidance.rules", name)(**options).begin()
    return lambda x, pairs, w, index=0: join(x, Moment(0.5, *POINT, index), pairs, w)


def close(actual: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(actual, reference, rtol=2e-5, atol=2e-5)


@SCALES
def test_classifier_free_guidance(w: float) -> None:
    x, pairs = predictions(2)
    result = begun("linear")(x, pairs, w)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=w)
    for actual, c, u in (
        (result.x0, pairs[0].x0, pairs[1].x0),
        (result.eps, pairs[0].eps, pairs[1].eps),
    ):
        close(actual, guider.forward(c, u).pred)


@SCALES
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale(w: float, phi: float) -> None:
    x, pairs = predictions(2)
    reference = (
        guiders.ClassifierFreeGuidance(guidance_scale=w, guidance_rescale=phi)
        .forward(pairs[0].x0, pairs[1].x0)
        .pred
    )
    close(begun("rescale", phi=phi)(x, pairs, w).x0, reference)


@SCALES
@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0},
        {"eta": 0.0},
        {"eta": 0.4, "threshold": 5.0},
        {"momentum": -0.5, "threshold": 20.0},
    ],
)
def test_adaptive_projected_guidance(w: float, options: dict[str, float]) -> None:
    """Over four steps, for the momentum.

    By default diffusers starts from the unconditional prediction, sfumato from the conditional.
    """
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=w - 1,
        eta=options.get("eta", 0.0),
        adaptive_projected_guidance_rescale=options.get("threshold", 0.0),
        use_original_formulation=True,
    )
    guider.momentum_buffer = MomentumBuffer(options["momentum"]) if "momentum" in options else None
    join = begun("project", **options)
    for step in range(4):
        x, pairs = predictions(2, seed=10 * step)
        close(join(x, pairs, w).x0, guider.forward(pairs[0].x0, pairs[1].x0).pred)


@SCALES
def test_zero_star(w: float) -> None:
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=w, zero_init_steps=1)
    join = begun("zero_star")
    for step in range(3):
        x, pairs = predictions(2, seed=10 * step)
        guider.set_state(step, 3, torch.tensor(0))
        result = join(x, pairs, w, index=step)
        close(result.eps - result.x0, guider.forward(*(p.eps - p.x0 for p in pairs)).pred)


@pytest.mark.parametrize(("w", "second"), [(2.0, 3.8), (7.5, 1.5)])
def test_away_from_two(w: float, second: float) -> None:
    """diffusers' perturbed-attention guider with classifier-free guidance.

    Its scales count from the conditional prediction, where off is 0.
    """
    x, pairs = predictions(3)
    guider = guiders.PerturbedAttentionGuidance(
        guidance_scale=w - 1,
        perturbed_guidance_scale=second - 1,
        perturbed_guidance_layers=[0],
        use_original_formulation=True,
    )
    guider.set_state(1, 10, torch.tensor(0))
    close(
        begun("dual", kind="away", second=second)(x, pairs, w).x0,
        guider.forward(*(p.x0 for p in pairs)).pred,
    )


@torch.inference_mode()
def test_autoguidance() -> None:
    x, pairs = predictions(2)
    guider = guiders.AutoGuidance(guidance_scale=2.4, auto_guidance_layers=[0], dropout=0.1)
    guider.set_state(1, 10, torch.tensor(0))
    close(begun("linear")(x, pairs, 2.4).x0, guider.forward(pairs[0].x0, pairs[1].x0).pred)


VALUES: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
VALUES |= {"layers_per_block": 1, "attention_head_dim": 4, "cross_attention_dim": 12}
CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SELF = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SELF |= {"mid_block_type": "UNetMidBlock2D"}


def unets(values: dict[str, Any]) -> tuple[UNet, Any]:
    peer = randomised(diffusers.UNet2DConditionModel(**values))
    network = UNet(UNetConfig(**values))
    network.load_state_dict(peer.state_dict())
    return network.eval(), peer


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (CROSS, ["mid_block"]),
        (CROSS, ["down_blocks.0", "up_blocks.1"]),
        (SELF, ["down_blocks.1"]),
        (SELF, ["up_blocks.0.attentions.1"]),
    ],
)
@torch.inference_mode()
def test_perturbed_attention(values: dict[str, Any], layers: list[str]) -> None:
    """diffusers' processor perturbs the second half of a doubled batch, in its layers."""
    network, peer = unets(VALUES | values)
    processors = {
        name: PAGIdentitySelfAttnProcessor2_0()
        if any(name.startswith(layer + ".") for layer in layers) and "attn2" not in name
        else processor
        for name, processor in peer.attn_processors.items()
    }
    peer.set_attn_processor(processors)
    x, timestep, tokens = normal(2, 3, 8, 8), torch.tensor([999.0, 333.0]), normal(2, 5, 12, seed=1)
    doubled = peer(
        x.repeat(2, 1, 1, 1), timestep.repeat(2), encoder_hidden_states=tokens.repeat(2, 1, 1)
    ).sample
    cond = Conditioning(tokens=tokens)
    close(network(x, timestep, cond), doubled[:2])
    result = replace_layers(network, layers, self_attentions, "layer")(x, timestep, cond)
    close(result, doubled[2:])
    assert (result - doubled[:2]).abs().max() > 1e-3


@torch.inference_mode()
def test_layers_left_out() -> None:
    """diffusers' U-Net with the forward of the same blocks replaced by hand."""
    network, peer = unets(VALUES | CROSS)
    x, timestep, tokens = normal(2, 3, 8, 8), torch.tensor([999.0, 333.0]), normal(2, 5, 12, seed=1)
    peer.mid_block.attentions[0].forward = lambda hidden_states, *rest, **named: (hidden_states,)
    block = peer.down_blocks[1].resnets[0]
    block.forward = lambda hidden_states, *rest, **named: block.conv_shortcut(hidden_states)
    peer.up_blocks[1].attentions[0].transformer_blocks[0].attn1.forward = (
        lambda hidden_states, **named: torch.zeros_like(hidden_states)
    )
    expected = peer(x, timestep, encoder_hidden_states=tokens).sample
    layers = [
        "mid_block.attentions",
        "down_blocks.1.resnets.0",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
    ]
    cond = Conditioning(tokens=tokens)
    result = replace_layers(network, layers, branches, "layer")(x, timestep, cond)
    close(result, expected)
    assert (result - network(x, timestep, cond)).abs().max() > 1e-3
