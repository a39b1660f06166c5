"""Z-Image beside diffusers, with small random networks: the transformer, its prompts, images of
the pipeline, folders and single files both ways.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import text_encoders
from helpers.models import random_network
from sfumato.checkpoints import families
from sfumato.checkpoints.checkpoint import Checkpoint, Component
from sfumato.checkpoints.formats.folder import load_part, save_part
from sfumato.checkpoints.lazy_tensor import from_tensors
from sfumato.cli import main
from sfumato.errors import UserError
from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.loading import load
from sfumato.predict.conditioners.z_image_text import ZImageText, ZImageTextConfig
from sfumato.predict.networks import z_image
from sfumato.predict.networks.z_image import ZImageConfig, ZImageTransformer
from sfumato.sampling import Request
from sfumato.tasks.image_to_image import image_to_image
from sfumato.types import Conditioning

WIDTH = 12
TINY: dict[str, Any] = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
}
TINY |= {"cap_feat_dim": WIDTH, "axes_dims": (4, 6, 6), "axes_lens": (512, 64, 64)}
CONFIGS: dict[str, dict[str, Any]] = {
    "as published": TINY,
    "no norms of queries and keys": TINY | {"qk_norm": False},
    "no refiners": TINY | {"n_refiner_layers": 0},
    "other numbers": TINY
    | {
        "dim": 40,
        "n_heads": 2,
        "n_kv_heads": 2,
        "axes_dims": (8, 6, 6),
        "rope_theta": 100.0,
        "t_scale": 10.0,
        "norm_eps": 1e-2,
    }
    | {"n_layers": 1, "n_refiner_layers": 1, "in_channels": 3},
    "wider than its time": TINY
    | {"dim": 320, "n_heads": 20, "n_kv_heads": 20, "n_layers": 1, "n_refiner_layers": 1},
}
SIZES = [(8, 8), (7, 5), (6, 22), (16, 16)]
"""Latent cells: 16, 12, 33 and 64 tokens, of which the last need no padding."""
LENGTHS = [(5, 5), (5, 40), (300, 7, 32), (64,)]
"""Text tokens of each image."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, peer: Tensor, relative: float = 1e-5) -> None:
    assert actual.shape == peer.shape
    scale = float(peer.abs().max())
    assert float((actual - peer).abs().max()) <= relative * scale, (
        float((actual - peer).abs().max()),
        scale,
    )


@cache
def peer(name: str = "as published") -> Any:
    """diffusers' model with weights large enough that every one of them shows."""
    model = random_network(lambda: diffusers.ZImageTransformer2DModel(**CONFIGS[name]), 0)
    if not CONFIGS[name].get(
        "qk_norm", True
    ):  # scores in the hundreds would make rounding errors as many times larger
        for key, parameter in model.named_parameters():
            parameter.mul_(0.2 if ".to_q." in key or ".to_k." in key else 1.0)
    return model


def actual(name: str = "as published") -> ZImageTransformer:
    """The same weights in our network, without a file between."""
    network = ZImageTransformer(ZImageConfig(**CONFIGS[name]))
    network.load_state_dict(peer(name).state_dict())
    return network.eval().requires_grad_(False)


def inputs(
    network: ZImageTransformer, size: tuple[int, int], lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Conditioning]:
    """A batch whose texts are followed by padding."""
    count, most = len(lengths), max(lengths)
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    cond = Conditioning(normal(count, most, WIDTH, seed=1), mask)
    return normal(count, network.channels, *size), torch.linspace(1000, 30, count), cond


def velocity(model: Any, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The velocity that diffusers' pipeline would give its scheduler."""
    whole = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="replicate")
    assert cond.tokens is not None
    tokens = (
        list(cond.tokens)
        if cond.mask is None
        else [row[mask] for row, mask in zip(cond.tokens, cond.mask, strict=True)]
    )
    y = model([image[:, None] for image in whole], (1000 - t) / 1000, tokens).sample
    return -torch.stack(y)[:, :, 0, : x.shape[2], : x.shape[3]]


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_parity_in_both_directions_through_folders(name: str, tmp_path: Path) -> None:
    reference = peer(name)
    reference.save_pretrained(tmp_path / "theirs")
    network: Any = load_part(tmp_path / "theirs")
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    save_part(tmp_path / "ours", network)
    back, notes = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(notes.values()), notes
    kept = back.state_dict()
    assert all(torch.equal(tensor, kept[key]) for key, tensor in reference.state_dict().items())
    written, read = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")
    )
    assert {k: v for k, v in read.items() if k != "_diffusers_version"} == written
    assert ZImageConfig.from_dict(written) == network.config == ZImageConfig.from_dict(read)
    for size in SIZES:
        for lengths in LENGTHS:
            x, t, cond = inputs(network, size, lengths)
            close(network(x, t, cond), velocity(reference, x, t, cond))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_parity_in_float64(name: str) -> None:
    """Rotations, and in theirs the means of RMS norms, are float32 there too."""
    network, reference = actual(name).double(), peer(name)
    try:
        reference.double()
        for size in SIZES[:3]:
            x, t, cond = inputs(network, size, (5, 40))
            x, cond = x.double(), cond.to(dtype=torch.float64)
            close(network(x, t, cond), velocity(reference, x, t, cond), 1e-6)
    finally:
        reference.float()


@torch.inference_mode()
def test_parity_far_from_the_origin() -> None:
    """Angles of hundreds of turns, rounded as in diffusers.

    There are more tokens than a feed-forward layer takes at a time.
    """
    network, reference = actual(), peer()
    x, t, cond = inputs(network, (128, 20), (470, 3))
    close(network(x, t, cond), velocity(reference, x, t, cond))
    x, t, cond = inputs(network, (70, 74), (9,))
    close(network(x, t, cond), velocity(reference, x, t, cond))


@torch.inference_mode()
def test_texts_without_a_mask_count_as_a_whole() -> None:
    network, reference = actual(), peer()
    x, t, cond = inputs(network, (6, 10), (33, 33))
    plain = Conditioning(cond.tokens)
    close(network(x, t, plain), velocity(reference, x, t, plain))
    assert torch.equal(network(x, t, plain), network(x, t, cond))


# ---- masks ---------------------------------------------------------------------------------------


@torch.inference_mode()
def test_masked_tokens_are_as_if_they_were_not_there() -> None:
    """Wherever they are, whatever is in them: behind the text, before it, within it."""
    network = actual()
    x, t, cond = inputs(network, (6, 10), (7, 7))
    assert cond.tokens is not None
    expected = network(x, t, Conditioning(cond.tokens))
    for places in ([0, 1, 2, 3, 4, 5, 6], [33, 34, 35, 36, 37, 38, 39], [0, 3, 4, 9, 20, 31, 39]):
        spread, mask = torch.full((2, 40, WIDTH), 100.0), torch.zeros(2, 40, dtype=torch.bool)
        spread[:, places], mask[:, places] = cond.tokens, True
        assert torch.equal(network(x, t, Conditioning(spread, mask)), expected), places


@torch.inference_mode()
def test_a_text_of_no_tokens_is_padding_alone() -> None:
    network = actual()
    x, t, cond = inputs(network, (6, 10), (7, 40))
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    none = network(x, t, Conditioning(cond.tokens, nothing))
    assert none.isfinite().all() and torch.equal(
        none, network(x, t, Conditioning(torch.empty(2, 0, WIDTH)))
    )
    some = nothing.clone()
    some[1] = True
    assert torch.equal(network(x, t, Conditioning(cond.tokens, some))[0], none[0])


@pytest.mark.invariance
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    """Prompts of different lengths, in one group of 32 and in several, some neighbours of one
    length.
    """
    network, lengths = actual(name), (5, 9, 70, 40, 41, 7, 32, 33, 64, 3, 100)
    for size in [(7, 9), (16, 16), (3, 2)]:
        x, t, cond = inputs(network, size, lengths)
        alone = [network(x[i : i + 1], t[i : i + 1], cond[i : i + 1])[0] for i in range(len(x))]
        for first, batch in [(0, 2), (1, 2), (2, 3), (0, 11), (1, 7)]:
            rows = slice(first, first + batch)
            together = network(x[rows], t[rows], cond[rows])
            assert [i for i in range(batch) if not torch.equal(together[i], alone[first + i])] == []


@pytest.mark.invariance
@torch.inference_mode()
def test_bits_with_many_tokens() -> None:
    network = actual()
    x, t, cond = inputs(network, (62, 70), (40, 5, 40))
    together = network(x, t, cond)
    for i in range(3):
        assert torch.equal(
            together[i : i + 1], network(x[i : i + 1], t[i : i + 1], cond[i : i + 1])
        )


# ---- full size -----------------------------------------------------------------------------------

PUBLISHED = {"axes_lens": [1536, 512, 512]}
"""transformer/config.json of Tongyi-MAI/Z-Image and Z-Image-Turbo, less diffusers' defaults."""


def test_full_size() -> None:
    """The same keys and shapes; 6 billion parameters, by the model's card."""
    with torch.device("meta"):
        reference, network = (
            diffusers.ZImageTransformer2DModel(**PUBLISHED),
            ZImageTransformer(ZImageConfig.from_dict(PUBLISHED)),
        )
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert shapes == {k: v.shape for k, v in reference.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == pytest.approx(6e9, rel=0.03)
    assert (network.channels, network.patch, network.sample_size, network.token_width) == (
        16,
        2,
        128,
        2560,
    )


def test_full_size_runs_on_the_meta_device() -> None:
    with torch.device("meta"), torch.inference_mode():
        network = ZImageTransformer(
            ZImageConfig.from_dict(PUBLISHED | {"n_layers": 1, "n_refiner_layers": 1})
        )
        x = torch.empty(1, 16, 128, 96)
        assert network(x, torch.empty(1), Conditioning(torch.empty(1, 512, 2560))).shape == x.shape


# ---- dtypes, training, compilers -----------------------------------------------------------------


@pytest.mark.skipif(
    not batch_invariant.FIXED_ORDER, reason="networks are packed for oneDNN on AVX2 or later"
)
@torch.inference_mode()
def test_prepared_for_inference() -> None:
    network = actual()
    x, t, cond = inputs(network, (6, 8), (5, 40))
    assert can_prepack(network)
    close(prepack(network)(x, t, cond), network(x, t, cond))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision(dtype: torch.dtype) -> None:
    network = actual()
    x, t, cond = inputs(network, (6, 8), (5, 40))
    y, half = network(x, t, cond), network.to(dtype)(x.to(dtype), t, cond.to(dtype=dtype))
    assert half.dtype == dtype
    assert float((half.float() - y).norm() / y.norm()) < (0.05 if dtype == torch.bfloat16 else 0.01)


@torch.inference_mode()
def test_float16_stays_finite() -> None:
    """Inner numbers of a feed-forward layer beyond 65504 are cut; the norm behind takes their size
    away.
    """
    network = actual().half()
    for key, parameter in network.named_parameters():
        parameter.mul_(
            1000 if key.startswith("layers.") and key.endswith((".w1.weight", ".w3.weight")) else 1
        )
    x, t, cond = inputs(network, (6, 8), (5, 40))
    assert network(x.half(), t, cond.to(dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("size", [(6, 8), (16, 16)], ids=["padded", "whole"])
def test_every_weight_gets_a_gradient(size: tuple[int, int]) -> None:
    """Also the padding tokens where nothing is padded: of zero, so that processes that train
    together do not wait.
    """
    network = actual().requires_grad_(True).train()
    lengths = (5, 40) if size == (6, 8) else (32, 64)
    x, t, cond = inputs(network, size, lengths)
    y = network(x, t, cond)
    y.square().mean().backward()
    with torch.inference_mode():
        close(network(x, t, cond), y.detach())
    assert not [k for k, p in network.named_parameters() if p.grad is None]
    idle = {
        k
        for k, p in network.named_parameters()
        if p.grad is not None and not float(p.grad.abs().max()) > 0
    }
    assert idle == (set() if size == (6, 8) else {"x_pad_token", "cap_pad_token"})


def test_rotations_are_those_of_diffusers() -> None:
    """With angles rounded to float32 as there: at these positions the cosine of the exact ones is
    up to 1e-5 away.
    """
    config, count = ZImageConfig(**TINY), 33 * 17
    grid = torch.cartesian_prod(torch.arange(33), torch.arange(17))
    positions = torch.zeros(z_image.padded_length(count) + 480, 3, dtype=torch.int32)
    positions[:count, 0], positions[:count, 1:], positions[-480:, 0] = (
        481,
        grid,
        torch.arange(1, 481),
    )
    expected = torch.view_as_real(peer().rope_embedder(positions))
    result = z_image.rotation_of(config, 480, 33, 17, torch.device("cpu"))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-7)


def test_rotations_are_cached_rotation_and_no_part_of_the_weights() -> None:
    network = actual()
    with torch.inference_mode():
        groups = [
            z_image.groups_of(network.config, [32, 64, 64], 3, 5, torch.device("cpu"))
            for _ in range(2)
        ]
    (one, two), again = groups
    assert one.rotation is again[0].rotation and not one.rotation.is_inference()
    assert (one.images, two.images) == (slice(0, 1), slice(1, 3)) and (one.length, two.length) == (
        64,
        96,
    )
    assert one.rotation.shape == (64, 8, 2)
    assert not any("rope" in k or "rotation" in k for k in network.state_dict())


def test_exported() -> None:
    network = actual()
    x, t, cond = inputs(network, (6, 4), (5, 5))

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            return self.network(x, t, Conditioning(tokens))

    with torch.no_grad():
        program = torch.export.export(Bare(), (x, t, cond.tokens), strict=False)
        close(program.module()(x, t, cond.tokens), network(x, t, Conditioning(cond.tokens)))


COMPILED = """
import torch
from sfumato.predict.networks import z_image
from sfumato.predict.networks.z_image import ZImageConfig, ZImageTransformer
from sfumato.types import Conditioning

torch.manual_seed(0)
small = dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
small |= dict(cap_feat_dim=12, axes_dims=(4, 6, 6))
network = ZImageTransformer(ZImageConfig(**small)).eval()
x, t, tokens = torch.randn(2, 4, 6, 4), torch.tensor([10.0, 900.0]), torch.randn(2, 40, 12)
mask = torch.arange(40) < torch.tensor([[40], [5]])
with torch.no_grad():
    # lengths of masked texts are numbers of Python
    for cond, whole in ((Conditioning(tokens), True), (Conditioning(tokens, mask), False)):
        found = torch.compile(network, backend="eager", fullgraph=whole)(x, t, cond)
        assert z_image._cached_rotation.cache_info().currsize == 0, "a trace's tensors are not kept"
        expected = network(x, t, cond)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        z_image._cached_rotation.cache_clear()
"""


def test_compiled() -> None:
    """In a process of its own: the compiler cannot look through the checks of types and shapes that
    tests run with.
    """
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, "all_patch_size"),
        ({"all_f_patch_size": (2,)}, "an image has one frame"),
        ({"all_patch_size": (0,)}, "all_patch_size=0"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152 is not supported"),
        ({"n_kv_heads": 1}, "n_kv_heads 1: expected n_heads, 3"),
        ({"axes_dims": (4, 6, 8)}, "axes_dims"),
        ({"axes_dims": (3, 7, 6)}, "even numbers"),
        ({"axes_dims": (8, 8)}, "a list of 3"),
        ({"axes_lens": (512, 64, 0)}, "axes_lens=0"),
        ({"dim": 50}, "dim 50 / n_heads 3"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"n_refiner_layers": -1}, "n_refiner_layers=-1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"t_scale": True}, "t_scale=True"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"dilation": 3}, "dilation=3"),
    ],
)
def test_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ZImageConfig.from_dict(TINY | change)
    assert "\n" not in str(caught.value)


def test_conditioning_that_does_not_fit_is_refused() -> None:
    network = actual()
    x, t, cond = inputs(network, (4, 4), (5, 5))
    tokens = cond.tokens
    assert tokens is not None
    wrong: list[tuple[Tensor, Conditioning, str]] = [
        (x, Conditioning(), "tokens .* is missing"),
        (x, Conditioning(tokens[..., :5]), "of width 5"),
        (x, Conditioning(tokens, concat=x), "no use for Conditioning.concat"),
        (x, Conditioning(tokens, references=(x,)), "no use for Conditioning.references"),
        (x, Conditioning(tokens, residuals=(tokens,)), "no use for Conditioning.residuals"),
        (x, Conditioning(tokens, image_tokens=tokens), "no use for Conditioning.image_tokens"),
        (normal(2, 3, 4, 4), cond, "takes latents of 4 channels and was given 3"),
        (
            normal(2, 4, 4, 130),
            cond,
            r"2 x 65 tokens .* \(34, 2, 65\) positions: this Z-Image has \(512, 64, 64\)",
        ),
        (x, Conditioning(normal(2, 500, WIDTH)), "a text of 512 tokens with padding"),
    ]
    masked = Conditioning(tokens)
    object.__setattr__(
        masked, "mask", torch.ones(2, 3, dtype=torch.bool)
    )  # the test run would check the shape here already
    for latents, arguments, message in [*wrong, (x, masked, "mask is")]:
        with pytest.raises(UserError, match=message) as caught:
            network(latents, t, arguments)
        assert "\n" not in str(caught.value)


# ---- prompts -------------------------------------------------------------------------------------

PROMPTS = [
    "a cat, a red dog",
    "",
    "Ein Hund & zwei Katzen: 3 Fälle!",
    "a cat, a red dog",
    "A (cat:1.3) in [IMG] brackets",
    "  a \n cat ",
]
LONG = "a cat sat on the mat " * 40


@cache
def reader() -> Any:
    return text_encoders.qwen_model()


def pipeline(shift: float = 3.0, encoder: Any = None) -> Any:
    """diffusers' pipeline with tiny parts; the autoencoder has sixteen channels at an eighth of the
    sides, as the published one.
    """
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }
    numbers = {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    vae = random_network(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            latent_channels=16,
            layers_per_block=1,
            **blocks,
            **numbers,
        ),
        2,
    )
    small = TINY | {"in_channels": 16, "n_layers": 1, "n_refiner_layers": 1}
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        vae=vae,
        text_encoder=reader().model if encoder is None else encoder,
        tokenizer=text_encoders.qwen_tokenizer(),
        transformer=random_network(lambda: diffusers.ZImageTransformer2DModel(**small), 1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Folders as diffusers writes them, by the scheduler's shift: 3 of Turbo, 6 of the base
    model.
    """
    root = tmp_path_factory.mktemp("z_image")
    for shift in (3.0, 6.0):
        pipeline(shift).save_pretrained(root / str(shift))
    return {shift: root / str(shift) for shift in (3.0, 6.0)}


@torch.no_grad()
def encoded(pipe: Any, prompts: list[str], negative: bool = False) -> list[Tensor]:
    """States of the prompts, or of no negative prompts."""
    result = pipe.encode_prompt(list(prompts), device="cpu", do_classifier_free_guidance=negative)
    return result[1] if negative else result[0]


def same(cond: Conditioning, states: list[Tensor]) -> None:
    assert cond.tokens is not None and cond.mask is not None and cond.vector is None
    assert cond.tokens.shape == (len(states), 512, 12) and cond.tokens.dtype == torch.float32
    for row, mask, expected in zip(cond.tokens, cond.mask, states, strict=True):
        assert int(mask.sum()) == len(expected)
        close(row[mask], expected)
        assert not row[~mask].any(), "padding is zero"


def test_prompts_are_read_as_diffusers_reads_them(folders: dict[float, Path]) -> None:
    actual = ZImageText.from_folder(folders[3.0])
    same(actual(PROMPTS), encoded(pipeline(), PROMPTS))
    same(actual.null(2), encoded(pipeline(), ["a", "b"], negative=True))
    tokens = actual(PROMPTS).tokens
    assert torch.equal(tokens[0], tokens[3]) and not torch.allclose(tokens[0], tokens[1], atol=1e-3)


def test_the_answer_may_think(folders: dict[float, Path]) -> None:
    """FLUX.2 klein reads with the same model up to where an answer without thinking begins, four
    tokens more.
    """
    framed = ZImageText.from_folder(folders[3.0]).encoder.apply_template(
        "a cat", None, thinking=True
    )
    assert framed == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_prompt_is_refused_or_cut_as_there(folders: dict[float, Path]) -> None:
    actual = ZImageText.from_folder(folders[3.0])
    with pytest.raises(UserError, match=r"prompt .* has 840 tokens: expected at most"):
        actual([LONG])
    cut = replace(actual, config=ZImageTextConfig(truncation="cut"))
    same(cut(["a cat", LONG]), encoded(pipeline(), ["a cat", LONG]))


def test_padding_on_either_side(folders: dict[float, Path]) -> None:
    """Tokens come first here, whatever side the tokenizer pads: attention depends on distances."""
    left = ZImageText.from_folder(folders[3.0])
    left.encoder.tokenizer.padding_side = "left"
    pipe = pipeline()
    pipe.tokenizer.padding_side = "left"
    same(left(PROMPTS), encoded(pipe, PROMPTS))


def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the whole language model, whose head is its table of tokens."""
    return {f"model.{key}": tensor for key, tensor in tensors.items()}


def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return published(tensors) | {"lm_head.weight": tensors["embed_tokens.weight"].clone()}


@pytest.mark.parametrize("change", [published, with_head])
def test_files_of_the_whole_language_model_are_the_same_weights(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    folders: dict[float, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(folders[3.0], tmp_path / "model"))
    file, config = (
        folder / "text_encoder" / "model.safetensors",
        folder / "text_encoder" / "config.json",
    )
    save_file(change(load_file(file)), file, {"format": "pt"})
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"architectures": ["Qwen3ForCausalLM"]})
    )
    result, expected = (ZImageText.from_folder(path) for path in (folder, folders[3.0]))
    assert torch.equal(result(PROMPTS[:1]).tokens, expected(PROMPTS[:1]).tokens)
    written, kept = result.tensors(), expected.tensors()
    assert (
        written.keys() - {"text_encoder.lm_head.weight"} == kept.keys()
        and result.identity() == expected.identity()
    )


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "text_encoder/config.json",
            {"model_type": "mistral3"},
            r"of type 'mistral3', \['Qwen3Model'\]: expected one of",
        ),
        (
            "text_encoder/config.json",
            {"architectures": ["Qwen3Moe"]},
            "expected one of .*Qwen3ForCausalLM",
        ),
        ("text_encoder/config.json", {"num_experts": 3}, "num_experts=3 is not known"),
        (
            "conditioner/config.json",
            {"_class_name": "flux2_text"},
            "of class 'flux2_text': expected z_image_text",
        ),
        (
            "conditioner/config.json",
            {"_class_name": "z_image_text", "layers": [3]},
            "layers=.* is not known to ZImageTextConfig",
        ),
        (
            "conditioner/config.json",
            {"_class_name": "z_image_text", "truncation": "chunks"},
            "unknown truncation 'chunks'",
        ),
        (
            "conditioner/config.json",
            {"_class_name": "z_image_text", "max_sequence_length": 1},
            "expected a whole number of at least 2",
        ),
    ],
)
def test_folders_of_other_texts_are_refused(
    file: str, change: dict[str, Any], message: str, folders: dict[float, Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders[3.0], tmp_path / "model")) / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    with pytest.raises(UserError, match=message) as caught:
        ZImageText.from_folder(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_another_language_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of type 'mistral3': Z-Image reads prompts with qwen3"):
        ZImageText.from_folder(text_encoders.write(tmp_path / "dev", "flux2_dev"))


@pytest.mark.parametrize("name", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_the_pipeline_chooses_the_conditioner(
    name: str, folders: dict[float, Path], tmp_path: Path
) -> None:
    """FLUX.2 klein has a text encoder of the same class."""
    folder = Path(shutil.copytree(folders[3.0], tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "Qwen3Model"]
    index["text_encoder"] = ["transformers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert type(load(folder).conditioner) is ZImageText
    if name == "Qwen3ForCausalLM":
        index["_class_name"] = "Flux2KleinPipeline"
        (folder / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(
            UserError, match="attends to tokens of width 12, the text encoders give 36"
        ):
            load(folder)


def test_a_folder_without_a_chat_template_is_refused(
    folders: dict[float, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[3.0], tmp_path / "model"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        ZImageText.from_folder(folder)


def test_saved_texts_open_in_diffusers_and_here(folders: dict[float, Path], tmp_path: Path) -> None:
    from transformers import Qwen3Model

    actual = ZImageText.from_folder(folders[3.0])
    actual.save(tmp_path)
    assert actual.index()["text_encoder"] == ["transformers", "Qwen3Model"]
    model = Qwen3Model.from_pretrained(tmp_path / "text_encoder")
    same(actual(PROMPTS), encoded(pipeline(encoder=model), PROMPTS))
    again = ZImageText.from_folder(tmp_path)
    assert again.config == actual.config and again.identity() == actual.identity()
    assert torch.equal(again(PROMPTS).tokens, actual(PROMPTS).tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_texts_in_half_precision(dtype: torch.dtype, folders: dict[float, Path]) -> None:
    half, whole = (
        ZImageText.from_folder(folders[3.0], kind)(["a red cat"]) for kind in (dtype, torch.float32)
    )
    assert (
        half.tokens is not None and whole.tokens is not None and half.tokens.dtype == torch.float32
    )
    assert float((half.tokens - whole.tokens).norm() / whole.tokens.norm()) < 0.05


# ---- images --------------------------------------------------------------------------------------

WORDS = ["a red cat", "two dogs, 3 cats sit on the mat, and a fox looks at them from afar"]
"""Padded to 64 tokens and to 96."""


def images(pipe: Any, **options: Any) -> Tensor:
    """Of seeds 0, 1 ..., as ours."""
    generators = [torch.Generator().manual_seed(k) for k in range(len(WORDS))]
    result = pipe(list(WORDS), generator=generators, output_type="np", **options).images
    return torch.from_numpy(result).permute(0, 3, 1, 2)


def compare(result: Tensor, expected: Tensor) -> None:
    assert result.shape == expected.shape
    assert expected.std() > 0.02, "images in which something can be seen"
    assert (result - expected).abs().max() < 1e-3, float((result - expected).abs().max())


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
def test_text_to_image(shift: float, size: tuple[int, int], folders: dict[float, Path]) -> None:
    """Their scale of guidance is one less than ours: pos + s (pos - neg)."""
    pipe, model = pipeline(shift), load(folders[shift])
    assert model.sample_size == 1024 and (model.defaults.sampler, model.defaults.spacing) == (
        "euler",
        "trailing",
    )
    where: dict[str, Any] = {"height": size[0], "width": size[1]}
    off = model.generate(WORDS, steps=4, guidance=0, output="tensor", **where)
    for scale in (0.0, 4.0):
        result = model.generate(WORDS, steps=4, guidance=1 + scale, output="tensor", **where)
        compare(result, images(pipe, num_inference_steps=4, guidance_scale=scale, **where))
        assert torch.equal(off, result) == (scale == 0), "0 is off here and there"
    assert torch.equal(
        result[1:],
        model.generate(WORDS[1], steps=4, guidance=5.0, seed=1, output="tensor", **where),
    )


def test_another_negative_prompt(folders: dict[float, Path]) -> None:
    pipe, model = pipeline(6.0), load(folders[6.0])
    options: dict[str, Any] = {"height": 32, "width": 32}
    expected = images(
        pipe, num_inference_steps=2, guidance_scale=4.0, negative_prompt=["a dog"] * 2, **options
    )
    compare(
        model.generate(
            WORDS, steps=2, guidance=5.0, negative_prompt="a dog", output="tensor", **options
        ),
        expected,
    )
    assert (
        expected - images(pipe, num_inference_steps=2, guidance_scale=4.0, **options)
    ).abs().max() > 1e-3


def test_guidance_at_some_times(folders: dict[float, Path]) -> None:
    """Their `cfg_truncation` c is of times after the shift: of 1, 0.9, 0.75 and 0.5 the last is not
    guided.
    """
    pipe, model, c = pipeline(3.0), load(folders[3.0]), 0.4
    expected = images(
        pipe, num_inference_steps=4, guidance_scale=4.0, cfg_truncation=c, height=32, width=32
    )
    guidance = f"5 interval:high=1,low={(1 - c) / (1 + 2 * c)}"
    options: dict[str, Any] = {"steps": 4, "height": 32, "width": 32, "output": "tensor"}
    compare(model.generate(WORDS, guidance=guidance, **options), expected)
    assert (model.generate(WORDS, guidance=5.0, **options) - expected).abs().max() > 1e-3


def test_streamed(folders: dict[float, Path]) -> None:
    """Weights read from the files as they are needed: the same images to the last bit."""
    whole, streamed = load(folders[3.0]), load(folders[3.0], memory="64GB")
    options: dict[str, Any] = {
        "steps": 2,
        "height": 32,
        "width": 32,
        "guidance": 3.0,
        "output": "tensor",
    }
    assert torch.equal(streamed.generate(WORDS, **options), whole.generate(WORDS, **options))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image(strength: float, folders: dict[float, Path]) -> None:
    """A number of steps that is whole: where it is not, we round down, and they up."""
    parts = pipeline(6.0)
    pipe = diffusers.ZImageImg2ImgPipeline(**parts.components)
    pipe.set_progress_bar_config(disable=True)
    model, photo = load(folders[6.0]), torch.rand(1, 3, 32, 48, generator=seeded(7))
    run: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, "strength": strength}
    expected = images(pipe, image=torch.cat([photo, photo]), height=32, width=48, **run)
    request = Request(WORDS, steps=4, guidance=3.0)
    plan = image_to_image(model, photo * 2 - 1, request, strength=strength, posterior="sample")
    compare(model.run(plan, output="tensor"), expected)


# ---- on disk -------------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."
SIZE: dict[str, Any] = {"height": 16, "width": 32}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shift", "steps", "guidance"), [(3.0, 8, 1.0), (6.0, 50, 5.0)])
def test_defaults(
    shift: float, steps: int, guidance: float, folders: dict[float, Path], tmp_path: Path
) -> None:
    """Turbo and the base model differ in the scheduler's shift alone; a folder of ours keeps what
    the user has chosen.
    """
    model = load(folders[shift])
    assert (model.defaults.steps, model.defaults.guidance) == (steps, guidance)
    chosen = replace(model, defaults=replace(model.defaults, steps=5, guidance=2.0))
    chosen.save(tmp_path / "ours")
    assert load(tmp_path / "ours").defaults == chosen.defaults


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_diffusers_opens_saved_folders(
    shift: float, folders: dict[float, Path], tmp_path: Path
) -> None:
    """The same classes, the same tensors under the same names, and the same images."""
    model = load(folders[shift])
    model.save(tmp_path / "ours")
    pipe, published = (
        diffusers.ZImagePipeline.from_pretrained(path)
        for path in (tmp_path / "ours", folders[shift])
    )
    for name in ("transformer", "vae", "text_encoder"):
        actual, peer = (getattr(which, name).state_dict() for which in (pipe, published))
        assert actual.keys() == peer.keys(), name
        assert all(torch.equal(actual[key], peer[key]) for key in actual), name
    assert pipe.scheduler.config["shift"] == shift
    index, before = (
        json.loads((path / "model_index.json").read_text())
        for path in (tmp_path / "ours", folders[shift])
    )
    assert {k: v for k, v in index.items() if k not in ("_sfumato", "tokenizer")} == {
        k: v for k, v in before.items() if k not in ("_diffusers_version", "tokenizer")
    }
    again = load(tmp_path / "ours")
    assert again.hash == model.hash and again.defaults == model.defaults
    pipe.set_progress_bar_config(disable=True)
    drawn = images(pipe, num_inference_steps=3, guidance_scale=2.0, **SIZE)
    compare(again.generate(WORDS, steps=3, guidance=3.0, output="tensor", **SIZE), drawn)


@pytest.fixture(scope="module")
def published_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny parts whose configs are those that a reader of the file would guess."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {
        "vocab_size": 280,
        "hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=True)
    pipe = pipeline(encoder=random_network(lambda: Qwen3Model(config), 5))
    values = dict(pipe.vae.config) | {"block_out_channels": (32,) * 4, "norm_num_groups": 32}
    vae = random_network(lambda: diffusers.AutoencoderKL.from_config(values), 2)
    small = dict(pipe.transformer.config) | {"axes_lens": [1536, 512, 512]}
    network = random_network(lambda: diffusers.ZImageTransformer2DModel.from_config(small), 1)
    pipe.register_modules(vae=vae, transformer=network)
    folder = tmp_path_factory.mktemp("published") / "folder"
    pipe.save_pretrained(folder)
    return folder


def original(folder: Path) -> dict[str, Tensor]:
    """The network's tensors under their original names."""
    network: Any = load_part(folder / "transformer")
    raw = families.by_name("z_image").write(
        Checkpoint(
            {"transformer": Component(network.to_config(), from_tensors(network.state_dict()))}
        )
    )
    assert not raw.metadata, "keys and shapes tell all of a published config"
    return {key: lazy.load().contiguous() for key, lazy in raw.tensors.items()}


def drawn_by(model: Any) -> Tensor:
    return model.generate(
        "a red dog", steps=2, guidance=3.0, seed=3, output="latent", height=16, width=16
    )


def test_the_original_names(published_kind: Path) -> None:
    """Those of the published single files, in both directions, and the config from their shapes."""
    tensors = original(published_kind)
    assert {
        "x_embedder.weight",
        "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight",
        "layers.0.attention.qkv.weight",
        "layers.0.attention.out.weight",
        "layers.0.attention.q_norm.weight",
        "noise_refiner.0.adaLN_modulation.0.bias",
        "context_refiner.0.feed_forward.w2.weight",
        "cap_embedder.0.weight",
        "t_embedder.mlp.2.bias",
        "x_pad_token",
        "cap_pad_token",
    } <= tensors.keys()
    assert not any("adaLN" in key for key in tensors if key.startswith("context_refiner"))
    network = load_part(published_kind / "transformer")
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(tensors))
    assert converted.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[key], value) for key, value in network.state_dict().items())
    lumina = {
        key.replace("adaLN_modulation.0", "adaLN_modulation.1"): tuple(value.shape)
        for key, value in tensors.items()
        if not key.endswith("pad_token")
    }
    with pytest.raises(UserError, match="of no known layout"):
        families.detect(lumina, "Lumina 2")


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_network_beside_a_folder(prefix: str, published_kind: Path, tmp_path: Path) -> None:
    """A file of the network alone, with a norm that nothing reads, and streamed."""
    model, file = load(published_kind), tmp_path / "net.safetensors"
    tensors = {prefix + key: value for key, value in original(published_kind).items()}
    save_file(tensors | {f"{prefix}norm_final.weight": torch.ones(48)}, file)
    base = Path(shutil.copytree(published_kind, tmp_path / "base"))
    (base / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    for options in ({}, {"memory": "64GB"}):
        opened = load(base, transformer=file, **options)
        assert torch.equal(drawn_by(opened), drawn_by(model))
    assert main(["convert", str(file), str(tmp_path / "net")]) == 0
    config = json.loads((tmp_path / "net" / "transformer" / "config.json").read_text())
    before = json.loads((published_kind / "transformer" / "config.json").read_text())
    assert config == {k: v for k, v in before.items() if k != "_diffusers_version"}
    assert (
        main(["convert", str(published_kind / "transformer"), str(tmp_path / "b.safetensors")]) == 0
    )
    assert load_file(tmp_path / "b.safetensors").keys() == original(published_kind).keys()


def test_a_config_that_keys_do_not_tell(tmp_path: Path) -> None:
    """Fields stand in the metadata: some of them, or all where heads of no published kind divide
    otherwise among the axes.
    """
    for name in ("as published", "other numbers"):
        network = actual(name)
        save_part(tmp_path / name, network)
        file, folder = tmp_path / f"{name}.safetensors", tmp_path / f"{name} again"
        assert main(["convert", str(tmp_path / name), str(file)]) == 0
        assert main(["convert", str(file), str(folder)]) == 0
        again: Any = load_part(folder / "transformer")
        assert again.config == network.config
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_gguf_and_eight_bits(published_kind: Path, tmp_path: Path) -> None:
    """Files of the community: fused attention, no prefix, and padding tokens without their side of
    1.
    """
    tensors, model = original(published_kind), load(published_kind)
    writer = gguf.GGUFWriter(tmp_path / "net.gguf", "lumina2")
    for key, value in tensors.items():
        writer.add_tensor(key, value.numpy()[0] if key.endswith("pad_token") else value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(
        drawn_by(load(published_kind, transformer=tmp_path / "net.gguf")), drawn_by(model)
    )
    eights: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if value.ndim == 2 and not key.endswith("pad_token"):
            eights[key] = (16 * value).to(torch.float8_e4m3fn)
            eights[f"{key.removesuffix('weight')}scale_weight"] = torch.tensor(1 / 16)
        else:
            eights[key] = value
    save_file(eights, tmp_path / "fp8.safetensors")
    network = load(published_kind, transformer=tmp_path / "fp8.safetensors").denoiser.network
    key = "layers.0.feed_forward.w2.weight"
    assert torch.equal(network.state_dict()[key], eights[key].float() / 16)


def test_a_whole_model_in_one_file(published_kind: Path, tmp_path: Path) -> None:
    """Saved by us, with its metadata; made by others, without, and with the tokenizer of a folder;
    streamed; and through `convert` to a folder and back.
    """
    model, file = load(published_kind), tmp_path / "whole.safetensors"
    model.save(file)
    again = load(file)
    assert again.hash == model.hash and again.defaults == model.defaults
    assert again.conditioner.to_config() == model.conditioner.to_config()
    tensors, expected = load_file(file), drawn_by(model)
    assert torch.equal(drawn_by(again), expected)
    assert torch.equal(drawn_by(load(file, memory="64GB")), expected)
    tower = "text_encoders.qwen3_4b.transformer."
    assert f"{tower}model.layers.2.self_attn.q_norm.weight" in tensors
    starts = (PREFIX, "first_stage_model.", tower)
    assert all(key.startswith(starts) for key in tensors)

    head = {f"{tower}lm_head.weight": tensors[f"{tower}model.embed_tokens.weight"].clone()}
    save_file(tensors | head, tmp_path / "other.safetensors")
    other = load(tmp_path / "other.safetensors", tokenizer=published_kind)
    assert (other.defaults.steps, other.defaults.guidance) == (8, 1.0)
    assert other.defaults.sampler == "euler" and torch.equal(drawn_by(other), expected)
    with pytest.raises(UserError, match="no tokenizers"):
        load(tmp_path / "other.safetensors")

    assert main(["convert", str(file), str(tmp_path / "8.safetensors"), "--dtype", "fp8"]) == 0
    small = load_file(tmp_path / "8.safetensors")
    assert small[f"{PREFIX}layers.0.attention.qkv.weight"].dtype == torch.float8_e4m3fn
    assert all(v.dtype == torch.bfloat16 for k, v in small.items() if not k.startswith(PREFIX))

    for source in (published_kind, file):
        one, folder = tmp_path / f"{source.stem}-1.safetensors", tmp_path / f"{source.stem}-2"
        assert main(["convert", str(source), str(one)]) == 0
        assert main(["convert", str(one), str(folder)]) == 0
        for place in (one, folder):
            opened = load(place)
            assert opened.hash == model.hash and opened.defaults == model.defaults
            assert torch.equal(drawn_by(opened), expected)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "ZImagePipeline"
        assert index["text_encoder"] == ["transformers", "Qwen3Model"]
        diffusers.ZImagePipeline.from_pretrained(folder)
