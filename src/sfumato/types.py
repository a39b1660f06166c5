"""The alphabet: Conditioning, Prediction, LatentSpace, and the shapes of tensors.

One letter, one meaning: `image` in [-1, 1], `z` clean standardised latent, `x` noisy latent, `eps` noise, `t` in [0, 1] with
0 clean and 1 noise, and x = alpha*z + sigma*eps.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

T = TypeVar("T")

Image = Float[Tensor, "B C H W"]
"""Pixels in [-1, 1]."""
Latent = Float[Tensor, "B C h w"]
"""A standardised latent, clean (`z`) or noisy (`x`)."""
Noise = Callable[[], Tensor]
"""Draws the next standard-normal tensor of the run's shape: image k's part comes from image k's own seed."""


@dataclass(frozen=True)
class Conditioning:
    """The only doors into a network. Every field is optional; the first axis of each is the batch.

    tokens     (B, L, D)    attended to by cross-attention, with `mask` (B, L), True where a token counts
    vector     (B, V)       joins the time embedding: pooled text, or class weights (one-hot for one class)
    concat     (B, K, h, w) joins x along channels: masks, low-resolution images, maps
    residuals  tuple of (B, c, h, w), added inside the network (ControlNet)
    image_tokens (B, M, D)  a second token set, for image prompts
    """

    tokens: Float[Tensor, "B L D"] | None = None
    mask: Bool[Tensor, "B L"] | None = None
    vector: Float[Tensor, "B V"] | None = None
    concat: Float[Tensor, "B K h w"] | None = None
    residuals: tuple[Tensor, ...] | None = None
    image_tokens: Float[Tensor, "B M D"] | None = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
            return None if value is None else tuple(map(change, value)) if isinstance(value, tuple) else change(value)

        return type(self)(*(apply(getattr(self, door)) for door in DOORS))  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same conditioning on a device and, for its floating-point tensors, in a dtype."""
        return self._map(lambda v: v.to(device=device, dtype=dtype if v.is_floating_point() else None))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Some rows of the batch."""
        return self._map(lambda v: v[rows])

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Joins batches. A door must be open in all parts or in none (`ValueError` otherwise)."""
        return cls._join(parts, lambda tensors: torch.cat(list(tensors)))

    def drop(self, dropped: Bool[Tensor, " B"], null: "Conditioning") -> "Conditioning":
        """Rows where `dropped` is True are taken from `null` (same shapes): the dropout that classifier-free guidance needs."""

        def choose(pair: Sequence[Tensor]) -> Tensor:
            ours, theirs = pair
            return torch.where(dropped.reshape(-1, *[1] * (ours.ndim - 1)).to(ours.device), theirs, ours)

        return self._join([self, null], choose)

    @classmethod
    def _join(cls, parts: Sequence["Conditioning"], join: Callable[[Sequence[Tensor]], Tensor]) -> "Conditioning":
        joined: dict[str, Tensor | tuple[Tensor, ...] | None] = {}
        for door in DOORS:
            values = [getattr(p, door) for p in parts]
            if any(v is None for v in values):
                if any(v is not None for v in values):
                    raise ValueError(f"conditionings differ: {door!r} is set in some parts of the batch and missing in others")
                joined[door] = None
            elif isinstance(values[0], tuple):
                joined[door] = tuple(join(column) for column in zip(*values, strict=True))
            else:
                joined[door] = join(values)
        return cls(**joined)  # pyright: ignore[reportArgumentType]


DOORS = tuple(f.name for f in fields(Conditioning))
"""The names of a conditioning's fields, in order."""


@dataclass(frozen=True)
class Prediction:
    """What a denoiser knows about x_t: the clean latent and the noise, related by x = alpha*x0 + sigma*eps.

    x0 and eps have the shape of x, (B, C, h, w), float32 or wider.
    """

    x0: Shaped[Tensor, "B C h w"]
    eps: Shaped[Tensor, "B C h w"]


@dataclass(frozen=True, eq=False)
class Query:
    """One question to a denoiser: x (B, C, h, w) at one time t, under a conditioning of B rows. The answer is a `Prediction` of B rows.

    Whoever answers several at once may put those to the same denoiser into one forward pass.
    """

    denoiser: Any
    x: Tensor
    t: float
    conditioning: Conditioning


Asking = Generator[list[Query], list[Prediction], T]
"""Work that needs predictions: yields questions, is sent their answers in the same order, ends with a T."""

Ask = Callable[[Tensor, float], Asking[Prediction]]
"""(x, t) -> what is there, by asking one denoiser, or several, or nobody: guidance and wrappers are of this kind, and stack."""


@dataclass(frozen=True)
class LatentSpace:
    """The coordinates of an autoencoder: raw = z * std + mean, per channel, measured from data.

    channels  C of z
    factor    pixels along a side for one latent cell (2, 4, 8 ...)
    mean, std one number a channel. Stable Diffusion's scaling factor s is mean 0, std 1/s in every channel.
    """

    channels: int
    factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std, default=1.0) <= 0:
            raise ValueError(
                f"a latent space of {self.channels} channels needs as many means and positive stds, got {self.mean} and {self.std}"
            )

    def _column(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)

    def standardise(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Raw encoder output -> z with mean 0 and variance 1 a channel."""
        return (raw - self._column(self.mean, raw)) / self._column(self.std, raw)

    def restore(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """z -> the numbers the decoder was trained on."""
        return z * self._column(self.std, z) + self._column(self.mean, z)
