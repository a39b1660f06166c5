"""Notes on settings that have no effect, one sentence each, before the first step.

A setting that is silently ignored costs a run. Defaults are not mentioned: nobody chose them.
"""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from sfumato.train.loop import LoopSettings
from sfumato.train.objectives.autoencoder import AutoencoderLoss
from sfumato.train.objectives.denoiser import DenoiserLoss


def loop_notes(loop: LoopSettings, images: int) -> list[str]:
    """Settings of the loop without effect.

    Args:
        loop: The settings.
        images: Number of training images.
    """
    notes = []
    steps, last = loop.steps, loop.steps / (9 + loop.steps)  # of n = steps - 1
    if loop.warmup > steps:
        notes.append(
            f"loop.warmup={loop.warmup} is not over at the last of {steps} steps: "
            f"the learning rate ends at {loop.lr_at(steps - 1):.3g} and never is {loop.lr:g}"
        )
    if chosen(loop, "ema") and loop.ema > last:
        notes.append(
            f"loop.ema={loop.ema}: the average's decay rises to (1 + n) / (10 + n), "
            f"{last:.5g} after {steps} steps, so that a larger loop.ema changes nothing"
        )
    if chosen(loop, "final_lr") and loop.decay == "constant":
        notes.append(f"loop.final_lr={loop.final_lr}: a constant learning rate has no end")
    if loop.batch_size > images:
        notes.append(
            f"loop.batch_size={loop.batch_size} is more than the {images} images: "
            "each batch has some of them twice or more"
        )
    if chosen(loop, "log_every") and loop.log_every > steps:
        notes.append(f"loop.log_every={loop.log_every}: the log has one line, at step {steps}")
    if chosen(loop, "save_every") and loop.save_every > steps:
        notes.append(
            f"loop.save_every={loop.save_every}: the one checkpoint is that of the end "
            f"(step {steps}), or of Ctrl-C"
        )
    if loop.previews == 0:
        if chosen(loop, "show_every"):
            notes.append(f"loop.show_every={loop.show_every}: loop.previews=0 turned previews off")
    elif chosen(loop, "show_every") and loop.show_every > steps:
        notes.append(f"loop.show_every={loop.show_every}: the one preview is at step {steps}")
    if loop.keep_every is not None and loop.keep_every % loop.save_every:
        notes.append(
            f"loop.keep_every={loop.keep_every} is no multiple of loop.save_every="
            f"{loop.save_every}: only steps of both are kept"
        )
    if loop.keep_every is not None and loop.keep_every > steps:
        notes.append(f"loop.keep_every={loop.keep_every}: the run has {steps} steps")
    return notes


def autoencoder_notes(loss: AutoencoderLoss, loop: LoopSettings, features: str | None) -> list[str]:
    """Settings of an autoencoder's loss without effect."""
    notes = []
    if loss.adversarial and loss.adversarial_start >= loop.steps:
        notes.append(
            f"loss.adversarial_start={loss.adversarial_start}: the discriminator never starts in "
            f"{loop.steps} steps"
        )
    if not loss.adversarial:
        names = ("adversarial_start", "discriminator_width", "discriminator_layers")
        notes += _without(loss, names, "loss.adversarial=0 leaves the discriminator out")
    if not loss.perceptual:
        notes += _without(loss, ("perceptual_network",), "loss.perceptual=0 leaves it out")
    if features and loop.previews == 0:
        notes.append(f"features={features!r}: without previews nothing is measured")
    return notes


def denoiser_notes(
    loss: DenoiserLoss, conditional: bool, learned_variance: bool, guidance: Any
) -> list[str]:
    """Settings of a denoiser's loss without effect.

    Args:
        loss: The settings.
        conditional: True for a model of classes or captions.
        learned_variance: True for a network that predicts a variance.
        guidance: The model's default.
    """
    notes = []
    if loss.times != "logit_normal":
        names = ("times_mean", "times_std")
        notes += _without(loss, names, f"loss.times={loss.times!r} has no mean and deviation")
    if loss.times != "mode":
        notes += _without(loss, ("times_scale",), f"loss.times={loss.times!r} has no scale")
    if loss.weighting != "min_snr":
        notes += _without(loss, ("min_snr_gamma",), f"loss.weighting is {loss.weighting!r}")
    if loss.error != "huber":
        notes += _without(loss, ("huber_delta",), f"loss.error is {loss.error!r}")
    if not learned_variance:
        notes += _without(loss, ("variance",), "the network predicts no variance")
    if not conditional:
        notes += _without(loss, ("drop",), "without classes or captions there is nothing to drop")
        if guidance != 1.0:
            notes.append(
                f"defaults.guidance={guidance!r}: without classes or captions nothing is guided"
            )
    return notes


def network_notes(requested: Any, built: Any) -> list[str]:
    """Fields of a network's config that the data or the autoencoder replaced."""
    return [
        f"network.{f.name}={value!r}: the data and the autoencoder make it {other!r}"
        for f in fields(requested)
        if chosen(requested, f.name)
        and (value := getattr(requested, f.name)) != (other := getattr(built, f.name))
        and f.name != "sample_size"
    ]


def chosen(settings: Any, name: str) -> bool:
    """True where a field of a dataclass has another value than its default."""
    field = next(f for f in fields(settings) if f.name == name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(settings, name) != default


def _without(settings: Any, names: Iterable[str], reason: str) -> list[str]:
    return [
        f"loss.{name}={getattr(settings, name)} has no effect: {reason}"
        for name in names
        if chosen(settings, name)
    ]
