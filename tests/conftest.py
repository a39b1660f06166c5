"""What every test runs under: shapes checked by beartype, no network, few threads; and the bundled
model where there is one.
"""

import os
import sys
import types
from pathlib import Path
from typing import Any, Self, get_args, runtime_checkable

# Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# tests compare bits, and say so when they want a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

assert not any(name.split(".")[0] == "sfumato" for name in sys.modules), (
    "sfumato was imported before its shapes could be checked"
)
# The hook decorates methods one by one, where beartype cannot know what Self is: it is not checked.
# An int is a fine float (PEP 484's tower).
settings = BeartypeConf(hint_overrides=FrozenDict({Self: object}), is_pep484_tower=True)


def check_types(function: Any) -> Any:
    """beartype, with protocols made checkable (by their methods' names) where the library had no
    need to.
    """
    waiting = list(getattr(function, "__annotations__", {}).values())
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
            runtime_checkable(hint)
        waiting += get_args(hint)
    return beartype(function, conf=settings)


checker = types.ModuleType("sfumato_typechecker")  # the hook takes a name only
checker.check = check_types  # type: ignore[attr-defined]
sys.modules[checker.__name__] = checker
install_import_hook("sfumato", "sfumato_typechecker.check")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "sfumato"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def source() -> Path:
    """The package's folder in the checkout."""
    return SOURCE


@pytest.fixture(scope="session")
def fashion() -> Any:
    """The bundled model, loaded once."""
    if not (SOURCE / "bundled" / "fashion" / "model_index.json").exists():
        pytest.skip(
            "the bundled model src/sfumato/bundled/fashion has not been trained into this checkout"
        )
    import sfumato

    return sfumato.load("fashion")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole model with random weights: 16x16 grey pictures of two classes, 8x8
    latents of two channels.
    """
    from sfumato.compress.kl import AutoencoderKL, KLConfig
    from sfumato.diffuse.parameterization import parameterization
    from sfumato.diffuse.process import Process
    from sfumato.diffuse.schedule import schedule
    from sfumato.model import LatentDiffusion
    from sfumato.predict.conditioners.class_names import ClassNames
    from sfumato.predict.denoiser import Denoiser
    from sfumato.predict.networks.unet import UNet, UNetConfig
    from sfumato.sampling import Defaults

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        autoencoder = AutoencoderKL(
            KLConfig(in_channels=1, out_channels=1, latent_channels=2, sample_size=16, **widths)
        )
        config = UNetConfig(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=3,
            **widths,
        )
        network = UNet(config)
        with torch.no_grad():  # so that no layer starts at zero and every input shows in the output
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    process = Process(schedule("flow"), parameterization("flow"))
    defaults = Defaults(steps=3, guidance=2.0)
    model = LatentDiffusion(
        autoencoder.eval(),
        Denoiser(network.eval(), process),
        ClassNames(("boot", "bag")),
        defaults,
        "tiny",
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save(folder)
    return folder


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """Networks that a test builds begin with the same random weights in every run: a bound is then
    kept or broken always.
    """
    torch.manual_seed(20260701)
