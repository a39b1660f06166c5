"""The alphabet: Conditioning, Prediction, LatentSpace, and the shapes of tensors.

One letter, one meaning: `image` in [-1, 1], `z` clean standardised latent, `x` noisy latent, `eps`
noise, `t` in [0, 1] with 0 clean and 1 noise, and x = alpha*z + sigma*eps.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sfumato.errors import UserError
from sfumato.validate import number_in, positive_int

Image = Float[Tensor, "B C H W"]
"""Pixels in [-1, 1]."""
Latent = Float[Tensor, "B C h w"]
"""A standardised latent, clean (`z`) or noisy (`x`)."""
Noise = Callable[[], Tensor]
"""Draws the next standard-normal tensor of a run, image k's part from its own seed."""


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a network beside x and t: every field is optional, batch first.

    Attributes:
        tokens: (B, L, D), attended to by cross-attention.
        mask: (B, L), True where a token counts.
        vector: (B, V), joins the time embedding: pooled text, or class weights (one-hot for one
            class).
        concat: (B, K, h, w), joins x along channels: masks, low-resolution images, maps.
        residuals: Each (B, c, h, w), or (B, N, D) for the tokens of a transformer, added inside the
            network (ControlNet).
        image_tokens: (B, M, D), a second token set, for image prompts.
        references: Each (B, C, k, l), clean latents of other images, of any sizes, that are
            attended to beside x (FLUX.1 Kontext, FLUX.2).
    """

    tokens: Float[Tensor, "B L D"] | None = None
    mask: Bool[Tensor, "B L"] | None = None
    vector: Float[Tensor, "B V"] | None = None
    concat: Float[Tensor, "B K h w"] | None = None
    residuals: tuple[Tensor, ...] | None = None
    image_tokens: Float[Tensor, "B M D"] | None = None
    references: tuple[Tensor, ...] | None = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Any) -> Any:
            if value is None:
                return None
            return tuple(map(change, value)) if isinstance(value, tuple) else change(value)

        return type(self)(*map(apply, self._values))

    @property
    def _values(self) -> list[Tensor | tuple[Tensor, ...] | None]:
        return [getattr(self, field) for field in FIELDS]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The same conditioning on a device, and its floating-point tensors in a dtype.

        Itself, where nothing changes. `vector` keeps its dtype: it may hold sizes in pixels, which
        bfloat16 would round. Networks cast its embedding.
        """
        target = None if device is None else torch.device(device)

        def kind(v: Tensor) -> torch.dtype | None:
            return dtype if v.is_floating_point() and v is not self.vector else None

        if all(target in (None, v.device) and kind(v) in (None, v.dtype) for v in self.tensors):
            return self
        return self._map(lambda v: v.to(device=target, dtype=kind(v)))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all fields, in order."""
        tuples = (v if isinstance(v, tuple) else (v,) for v in self._values if v is not None)
        return tuple(itertools.chain.from_iterable(tuples))

    @cached_property
    def sizes(self) -> tuple[Any, ...]:
        """Shapes that must agree to concatenate: each field's without the batch, or None."""

        def size(value: Tensor | tuple[Tensor, ...] | None) -> Any:
            if value is None:
                return None
            return tuple(map(size, value)) if isinstance(value, tuple) else value.shape[1:]

        return tuple(map(size, self._values))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some rows of the batch."""
        return self._map(lambda v: v[rows])

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Concatenate batches.

        Raises:
            ValueError: For a field that some parts have and others lack.
        """
        return cls._join(parts, lambda tensors: torch.cat(list(tensors)))

    def drop(self, dropped: Bool[Tensor, " B"], null: "Conditioning") -> "Conditioning":
        """Replace rows by those of `null` where `dropped`: classifier-free guidance's dropout."""

        def choose(pair: Sequence[Tensor]) -> Tensor:
            row, other = pair
            rows = dropped.reshape(-1, *[1] * (row.ndim - 1)).to(row.device)
            return torch.where(rows, other, row)

        return self._join([self, null], choose)

    @classmethod
    def _join(
        cls, parts: Sequence["Conditioning"], join: Callable[[Sequence[Tensor]], Tensor]
    ) -> "Conditioning":
        joined: dict[str, Tensor | tuple[Tensor, ...] | None] = {}
        for field in FIELDS:
            values = [getattr(p, field) for p in parts]
            if any(v is None for v in values):
                if any(v is not None for v in values):
                    raise ValueError(
                        f"conditionings differ: {field!r} is set in some parts of the batch "
                        "and missing in others"
                    )
                joined[field] = None
            elif isinstance(values[0], tuple):
                joined[field] = tuple(join(column) for column in zip(*values, strict=True))
            else:
                joined[field] = join(values)
        return cls(**joined)  # pyright: ignore[reportArgumentType]


FIELDS = tuple(f.name for f in fields(Conditioning))
"""The names of a conditioning's fields, in order."""


Pair = tuple[float, float]


def _check_pair(name: str, value: Any) -> None:
    """Raise `UserError` unless `value` is a tuple of 2 numbers of at least 0."""
    try:
        valid = isinstance(value, tuple) and len([number_in(name, n, 0) for n in value]) == 2
    except UserError:
        valid = False
    if not valid:
        raise UserError(f"{name}={value!r}: expected a tuple of 2 numbers of at least 0")


@dataclass(frozen=True)
class ImageSpec:
    """Size, crop and score of an image, for networks that are conditioned on them.

    These are SDXL's micro-conditionings (Podell et al. 2023, arXiv:2307.01952, section 2.2; the
    score is its refiner's). Fields named negative_* are those of the negative prompt; None: the
    same.

    Attributes:
        height: In pixels.
        width: In pixels.
        original_size: (height, width) of a training image before any resizing; None: this size.
        crop: (top, left) of the crop from such an image, in pixels.
        target_size: (height, width) after the crop; None: this size.
        aesthetic_score: In about 1 to 10.
    """

    height: int
    width: int
    original_size: Pair | None = None
    crop: Pair = (0, 0)
    target_size: Pair | None = None
    aesthetic_score: float = 6.0
    negative_original_size: Pair | None = None
    negative_crop: Pair | None = None
    negative_target_size: Pair | None = None
    negative_aesthetic_score: float = 2.5

    def __post_init__(self) -> None:
        for side in ("height", "width"):
            positive_int(f"image_spec: {side}", getattr(self, side), unit="pixels")
        for name in ("original_size", "target_size", "crop"):
            for field in (name, f"negative_{name}"):
                if getattr(self, field) is not None or field == "crop":
                    _check_pair(f"image_spec: {field}", getattr(self, field))
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            number_in(f"image_spec: {name}", getattr(self, name), 0)

    @property
    def size(self) -> Pair:
        """(height, width)."""
        return self.height, self.width

    @property
    def negative(self) -> "ImageSpec":
        """The size, crop and score of the negative prompt."""
        return replace(
            self,
            original_size=self.negative_original_size or self.original_size,
            crop=self.negative_crop or self.crop,
            target_size=self.negative_target_size or self.target_size,
            aesthetic_score=self.negative_aesthetic_score,
        )


@dataclass(frozen=True)
class Prediction:
    """Clean latent and noise that a denoiser predicts, with x = alpha*x0 + sigma*eps.

    x0 and eps have the shape of x, (B, C, h, w), float32 or wider. So has `variance`, of networks
    that predict one (None: of all others): where the log variance of a step lies, from -1, the
    smallest that the posterior can have, to 1, the largest (Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15, whose v is (variance + 1)/2); nothing holds it to that range.
    """

    x0: Shaped[Tensor, "B C h w"]
    eps: Shaped[Tensor, "B C h w"]
    variance: Shaped[Tensor, "B C h w"] | None = None

    def at(
        self, alpha: float, sigma: float, k: float = 0.0, x: Tensor | None = None
    ) -> Shaped[Tensor, "B C h w"]:
        """alpha*x0 + sigma*eps, the latent at a point of the process; plus k*x where x is given."""
        if sigma == 0:
            latent = alpha * self.x0
        else:
            latent = sigma * self.eps if alpha == 0 else (alpha * self.x0).add_(sigma * self.eps)
        return latent if x is None else latent.add_(k * x)

    def away(self, reference: "Prediction", w: float | Tensor) -> "Prediction":
        """Return reference + w (self - reference), in x0 and eps.

        Args:
            reference: The prediction to move away from.
            w: One number, or one an image (B, 1, 1, 1).
        """
        return Prediction(mixed(self.x0, reference.x0, w), mixed(self.eps, reference.eps, w))

    def with_variance(self, variance: Shaped[Tensor, "B C h w"] | None) -> Self:
        """The same with this variance."""
        if variance is self.variance:
            return self
        prediction = copy.copy(self)
        prediction.__dict__["variance"] = variance
        return prediction

    def size(self) -> Tensor:
        """One number that is NaN or infinite if x0 or eps has one.

        Quicker than a check of each; a sum may be too large without one.
        """
        return self.x0.sum() + self.eps.sum()


def mixed(conditional: Tensor, reference: Tensor, w: float | Tensor) -> Tensor:
    """Return reference + w (conditional - reference): bits do not depend on the batch."""
    return (w * (conditional - reference)).add_(reference)


@dataclass(frozen=True)
class LatentSpace:
    """The coordinates of an autoencoder: raw = z * std + mean, each channel's from data.

    Attributes:
        channels: C of z.
        factor: Pixels along a side of one latent cell (2, 4, 8 ...).
        mean: One number a channel.
        std: One number a channel. Stable Diffusion's scaling factor s is mean 0 and std 1/s.
    """

    channels: int
    factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = {len(self.mean), len(self.std)}
        if counts != {self.channels} or min(self.std, default=1.0) <= 0:
            raise UserError(
                f"a latent space of {self.channels} channels needs as many means and "
                f"positive stds, got {self.mean} and {self.std}: correct the config"
            )

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)

    def standardise(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Raw encoder output -> z with mean 0 and variance 1 a channel."""
        return (raw - self._column(self.mean, raw)) / self._column(self.std, raw)

    def restore(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Standardised z -> the numbers that the decoder was trained on."""
        return z * self._column(self.std, z) + self._column(self.mean, z)
