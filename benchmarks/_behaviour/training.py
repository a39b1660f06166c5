"""Cases of training: both stages, whole, interrupted and resumed, also by another version."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from _behaviour import commands, names
from _behaviour.outcome import Case, Hashed, Notes
from _behaviour.stored import tensors_of

if TYPE_CHECKING:
    from _behaviour.context import Context

STEPS, STOP = 5, 3
"""Of a run, and where it is interrupted: a checkpoint is written at each second step."""


def loop(**fields: Any) -> Any:
    """Settings of a short run."""
    settings: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 2,
        "ema": 0.9,
        "save_every": 2,
        "show_every": 3,
    }
    return names.build(
        "train.loop", "LoopSettings", **settings | {"log_every": 1, "weight_decay": 0.1} | fields
    )


def data(fixtures: Path, **fields: Any) -> Any:
    """The training pictures with classes."""
    return names.build(
        "train.recipe",
        "DataSettings",
        **{"source": str(fixtures / "data" / "classes"), "held_out": 0.2, **fields},
    )


def autoencoder(fixtures: Path, **fields: Any) -> Any:
    """The recipe of an autoencoder with a discriminator, for mirrored pictures."""
    network = names.build(
        "compress.kl",
        "KLConfig",
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=28,
    )
    loss = names.build(
        "train.objectives.autoencoder",
        "AutoencoderLoss",
        **{
            "adversarial": 0.5,
            "adversarial_start": 2,
            "discriminator_width": 8,
            **fields.pop("loss", {}),
        },
    )
    settings = {
        "data": data(fixtures, flip=True),
        "network": network,
        "loss": loss,
        "loop": loop(),
        "features": "fashion",
        **fields,
    }
    return names.build("train.recipe", "AutoencoderRecipe", **settings)


def denoiser(fixtures: Path, **fields: Any) -> Any:
    """Recipe of a class-conditional U-Net with dropout, on the bundled model's latents."""
    network = fields.pop("network", None) or names.build(
        "predict.networks.unet", "UNetConfig", down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D", up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, dropout=0.2,
    )  # fmt: skip
    loss = names.build(
        "train.objectives.denoiser",
        "DenoiserLoss",
        **{"times": "logit_normal", "drop": 0.3, **fields.pop("loss", {})},
    )
    defaults = names.build("sampling", "Defaults", steps=3, sampler="ddim", guidance=2.0)
    settings = {
        "autoencoder": bundled_autoencoder(),
        "data": data(fixtures),
        "network": network,
        "loss": loss,
        "loop": loop(),
    }
    return names.build(
        "train.recipe",
        "DenoiserRecipe",
        **settings | {"defaults": defaults, "name": "toy"} | fields,
    )


def bundled_autoencoder() -> Path:
    """The folder of the bundled model's autoencoder."""
    import sfumato

    return Path(str(sfumato.__file__)).parent / "bundled" / "fashion" / "vae"


def text_denoiser(fixtures: Path, **fields: Any) -> Any:
    """Recipe of a transformer conditioned on captions, with aspect buckets, on TAESD's latents."""
    network = names.build(
        "predict.networks.modern_dit",
        "ModernDiTConfig",
        patch_size=1,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        register_tokens=2,
    )
    captions = data(fixtures, source=str(fixtures / "data" / "captions"), size=32, buckets=8)
    settings = {
        "autoencoder": fixtures / "autoencoders" / "taesd-pair",
        "data": captions,
        "network": network,
        "schedule": "flow",
    }
    settings |= {"parameterization": "flow", "text": fixtures / "models" / "modern-dit-text"}
    return denoiser(fixtures, **settings | fields)


@contextlib.contextmanager
def interrupted(step: int, per_step: int = 1) -> Iterator[None]:
    """Context that ends when the optimizers inside are about to exceed so many steps."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > step * per_step:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(hook)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


def outcome(out: Path) -> dict[str, Any]:
    """Everything a run leaves: weights and optimizers, log, pictures; settings as notes."""
    logs = {}
    for file in sorted(out.rglob("log.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        logs[str(file.relative_to(out))] = [
            {k: v for k, v in line.items() if "second" not in k} for line in lines
        ]
    states = {
        str(file.relative_to(out)): Notes(read_json(file))
        for file in sorted(out.rglob("*.json"))
        if "finished" not in file.name
    }
    pictures = {
        str(file.relative_to(out)): commands.png(file)[0] for file in sorted(out.rglob("*.png"))
    }
    return {
        "tensors": Hashed(tensors_of(out)),
        "logs": logs,
        "pictures": pictures,
        "states": states,
    }


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file without the parts that name this machine's folders."""
    text = re.sub(r'"[^"]*/(fixtures|scratch|src|bundled)/', '"', file.read_text())
    values = json.loads(text)
    return values if isinstance(values, dict) else {"": values}


def make_runs(fixtures: Path) -> None:
    """Runs of the old code: an interrupted one of each stage, and a finished one."""
    runs = fixtures / "runs"
    with interrupted(STOP):
        autoencoder(fixtures).run(runs / "autoencoder")
    with interrupted(STOP):
        denoiser(fixtures).run(runs / "denoiser")
    with interrupted(STOP):
        text_denoiser(fixtures).run(runs / "text")
    denoiser(fixtures).run(runs / "finished")


def cases(context: "Context") -> Iterator[Case]:
    """Cases of training."""
    for name, run in _cases(context):
        yield Case(f"train/{name}", run)


def _cases(context: "Context") -> Iterator[tuple[str, Callable[[], Any]]]:
    def train(make: Callable[..., Any], name: str, **fields: Any) -> Any:
        out = context.scratch / name
        make(context.fixtures, **fields).run(out)
        return outcome(out)

    def resume(make: Callable[..., Any], name: str) -> Any:
        whole, resumed = context.scratch / f"{name}-whole", context.scratch / f"{name}-resumed"
        make(context.fixtures).run(whole)
        with interrupted(STOP):
            make(context.fixtures).run(resumed)
        if (resumed / "model").exists() or (resumed / "autoencoder" / "vae").exists():
            raise AssertionError(f"the run in {resumed} was not interrupted")
        make(context.fixtures).run(resumed)
        one, two = tensors_of(whole), tensors_of(resumed)
        if one.keys() != two.keys() or not all(
            torch.equal(value, two[key]) for key, value in one.items()
        ):
            raise AssertionError(
                f"the interrupted run in {resumed} ends with other weights than the whole one"
            )
        return outcome(resumed)

    def goes_on(make: Callable[..., Any], name: str) -> Any:
        out = context.scratch / f"old-{name}"
        shutil.copytree(context.fixtures / "runs" / name, out)
        make(context.fixtures).run(out)
        return outcome(out)

    recipes = {"autoencoder": autoencoder, "denoiser": denoiser, "text": text_denoiser}
    for name, make in recipes.items():
        yield f"{name}, interrupted and resumed", partial(resume, make, name)
        yield f"{name}, the old code's run goes on", partial(goes_on, make, name)
    yield "a finished run is left alone", lambda: goes_on(denoiser, "finished")
    yield (
        "the old code's model",
        lambda: context.load(context.fixtures / "runs" / "finished" / "model").generate(
            ["bag", "boot"], seed=2, output="latent"
        ),
    )
    for loss in (
        {"weighting": "min_snr"},
        {"times": "mode"},
        {"times": "uniform", "times_shift": 3.0},
        {"drop": 0.0},
    ):
        words = " ".join(f"{k}={v}" for k, v in loss.items())
        yield (
            f"denoiser, {words}",
            partial(train, denoiser, words.replace(" ", "-"), loss=loss, loop=loop(steps=2)),
        )
    for process in (("cosine", "v"), ("scaled_linear", "eps"), ("linear", "x0"), ("flow", "flow")):
        fields = {"schedule": process[0], "parameterization": process[1], "loop": loop(steps=2)}
        yield (
            f"denoiser, {process[0]} {process[1]}",
            partial(train, denoiser, "-".join(process), **fields),
        )
    for fields in (
        {"decay": "constant", "precision": "bf16"},
        {"decay": "linear", "clip": 0.1, "seed": 5},
    ):
        words = " ".join(f"{k}={v}" for k, v in fields.items())
        yield (
            f"denoiser, {words}",
            partial(train, denoiser, words.replace(" ", "-"), loop=loop(**fields)),
        )
    yield (
        "autoencoder, l2",
        partial(
            train,
            autoencoder,
            "l2",
            loss={"pixel": "l2", "kl": 1e-2, "adversarial": 0.0},
            loop=loop(steps=2),
        ),
    )
    yield (
        "by the command line, autoencoder",
        lambda: _command(context, "autoencoder", "fashion_mnist"),
    )
    yield (
        "by the command line, denoiser",
        lambda: _command(context, "denoiser", "fashion_mnist_dit"),
    )


def recipes_of(checkout: Path) -> Path:
    """The recipes of a checkout; before they were in the package they were beside it."""
    inside = checkout / "src" / "sfumato" / "train" / "recipes"
    return inside if inside.is_dir() else checkout / "recipes"


def _command(context: "Context", stage: str, recipe: str) -> Any:
    """A recipe of the checkout, its settings changed by flags."""
    out = context.scratch / f"command-{stage}"
    settings = {
        "data.source": context.fixtures / "data" / "classes",
        "loop.steps": 2,
        "loop.batch-size": 2,
        "loop.warmup": 1,
    }
    settings |= {
        "loop.save-every": 2,
        "loop.show-every": 9,
        "loop.log-every": 1,
        "loop.precision": "fp32",
    }
    settings |= {"defaults.steps": 2} if stage == "denoiser" else {}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    commands.sfumato(
        "train", stage, recipes_of(context.checkout) / f"{recipe}.py", "--out", out, *flags
    )
    return outcome(out)
