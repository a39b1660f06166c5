"""Predictions that compute x0 and eps lazily."""

from functools import cached_property

import torch
from jaxtyping import Shaped
from torch import Tensor

from sfumato.types import Prediction, mixed


class LazyPrediction(Prediction):
    """A prediction defined by `at` and `size`: x0 and eps are computed on first access."""

    @cached_property
    def x0(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The clean latent."""
        return self.at(1.0, 0.0)

    @cached_property
    def eps(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The noise."""
        return self.at(0.0, 1.0)


class LinearPrediction(LazyPrediction):
    """x0 = a*x + b*y and eps = c*x + d*y, from a latent x and a network's output y.

    Samplers and guidance mostly need one combination of x and y. Computed directly it is half the
    work, its coefficients are added in float64, and nothing is lost where x0 and eps are large and
    cancel (eps at nearly pure noise). x and y must not be changed in place while it is in use.

    Attributes:
        x: The latent.
        y: The network's output at x.
        solution: (a, b, c, d).
    """

    x: Tensor
    y: Tensor
    solution: tuple[float, float, float, float]

    def __init__(
        self,
        x: Shaped[Tensor, "B C h w"],
        y: Shaped[Tensor, "B C h w"],
        solution: tuple[float, float, float, float],
    ):
        fields = self.__dict__  # the dataclass is frozen
        fields["x"], fields["y"], fields["solution"] = x, y, solution

    def at(self, alpha: float, sigma: float, k: float = 0.0, x: Tensor | None = None) -> Tensor:
        """Return alpha*x0 + sigma*eps, and k*x where x is given, from x and y at once."""
        a, b, c, d = self.solution
        if x is not None and x is not self.x:
            return self.at(alpha, sigma).add_(k * x)
        # in place: one allocation less
        return ((alpha * a + sigma * c + k) * self.x).add_((alpha * b + sigma * d) * self.y)

    def away(self, reference: Prediction, w: float | Tensor) -> Prediction:
        """Return reference + w (self - reference), by the outputs if both are at one x."""
        if (
            not isinstance(reference, LinearPrediction)
            or reference.x is not self.x
            or reference.solution != self.solution
        ):
            return super().away(reference, w)
        return LinearPrediction(self.x, mixed(self.y, reference.y, w), self.solution)

    def size(self) -> Tensor:
        """Return the sum of y: x is finite, it was checked at the step before."""
        return self.y.sum()


class Selected(LazyPrediction):
    """One prediction for the images where `first` is True, another for the rest.

    Each image's numbers are those of its own prediction alone.

    Args:
        first: (B, 1, 1, 1) bool.
        one: The prediction where `first` is True.
        other: The prediction where it is False.
    """

    parts: tuple[Tensor, Prediction, Prediction]

    def __init__(self, first: Tensor, one: Prediction, other: Prediction):
        self.__dict__.update(parts=(first, one, other))

    def at(self, alpha: float, sigma: float, k: float = 0.0, x: Tensor | None = None) -> Tensor:
        """Return the latent of each image's own prediction."""
        first, one, other = self.parts
        return torch.where(first, one.at(alpha, sigma, k, x), other.at(alpha, sigma, k, x))

    def size(self) -> Tensor:
        """Return the sum of both."""
        return self.parts[1].size() + self.parts[2].size()
