"""The denoiser: network + process, (x, t, conditioning) -> Prediction(x0, eps).

Casts happen here and nowhere else: coefficients are float64, the state float32, and the network
runs in its own dtype. `evaluate_calls` batches the denoiser calls of many runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.batching import DenoiserCall
from sfumato.diffuse.process import Process
from sfumato.inference.prepack import can_prepack, clone_sharing_weights, compile_network, prepack
from sfumato.types import Conditioning, Prediction


@dataclass(frozen=True)
class Denoiser:
    """A network with its process.

    Args:
        network: (x, timestep, conditioning) -> the target of the process's parameterization.
        process: Schedule and parameterization.
    """

    network: nn.Module
    process: Process

    def output(
        self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """Return the network's raw output y at x, float32.

        Args:
            x: Noisy latents.
            t: One time, or one an image (B,).
            conditioning: Of B rows.

        Returns:
            (B, C, h, w), or (B, 2 C, h, w) with the channels of a variance last, where the network
            predicts one.
        """
        module, name = self._weight
        dtype = getattr(module, name).dtype
        timestep = self.process.timestep(t, x.device).expand(len(x))
        return self.network(
            self.process.network_input(x, t).to(dtype), timestep, conditioning.to(x.device, dtype)
        ).float()

    def split(
        self, x: Float[Tensor, "B C h w"], y: Float[Tensor, "B D h w"], t: float | Tensor
    ) -> Prediction:
        """Return the prediction of the output y at x.

        Twice as many channels as x has are the target and a variance (Nichol & Dhariwal 2021,
        arXiv:2102.09672, section 3.1).
        """
        channels = x.shape[1]
        prediction = self.process.split(x, y[:, :channels], t)
        return (
            prediction.with_variance(y[:, channels:]) if y.shape[1] == 2 * channels else prediction
        )

    @cached_property
    def _weight(self) -> tuple[nn.Module, str]:
        """(module, name) of the network's first weight, for its dtype: the search is slow."""
        return next(
            (module, name)
            for module in self.network.modules()
            for name, _ in module.named_parameters(recurse=False)
        )

    def optimized(self, compile: bool = False) -> "Denoiser":
        """Return the denoiser with a network prepared for inference on its device.

        See `LatentDiffusion.optimized`.

        Args:
            compile: Compile the network with torch.compile.
        """
        device = next(self.network.parameters()).device
        if compile:
            network = compile_network(self.network)
        elif can_prepack(self.network):
            network = prepack(self.network)
        elif device.type == "cpu":
            return self
        else:
            network = clone_sharing_weights(self.network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return replace(self, network=network)

    def __call__(
        self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning
    ) -> Prediction:
        """Predict x0 and eps, float32, of x at t, one time or one an image (B,)."""
        return self.split(x.float(), self.output(x, t, conditioning), t)


def evaluate_calls(queries: Sequence[DenoiserCall], rows: int | None = None) -> list[Prediction]:
    """Evaluate denoiser calls, batching those that fit into one forward pass.

    Each prediction is that of its call alone: on the CPU in float32 to the last bit. A denoiser of
    another class is called once a call. If it has a method `evaluate_calls(queries, forward)`, that
    gets all calls whose denoisers have the same `batch_key`, and `forward`, which evaluates calls
    of a `Denoiser`.

    Args:
        queries: The calls.
        rows: Largest batch of a forward pass; None: no limit.

    Returns:
        One prediction a call.
    """
    if len(queries) == 1:
        return _forward(queries, rows)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, query in enumerate(queries):
        key = getattr(query.denoiser, "batch_key", id(query.denoiser))
        groups.setdefault((key, query.x.shape[1:], query.conditioning.sizes), []).append(k)
    if len(groups) == 1:
        return _forward(queries, rows)
    predictions: dict[int, Prediction] = {}
    for members in groups.values():
        predictions |= zip(members, _forward([queries[k] for k in members], rows), strict=True)
    return [predictions[k] for k in range(len(queries))]


def _forward(queries: Sequence[DenoiserCall], rows: int | None) -> list[Prediction]:
    """Evaluate calls of one shape to one denoiser."""
    denoiser = queries[0].denoiser
    if hasattr(denoiser, "evaluate_calls"):  # a wrapper's, with work around the pass
        return denoiser.evaluate_calls(queries, lambda ready: _forward(ready, rows))
    if not isinstance(denoiser, Denoiser):  # of another class, which may take only one time at once
        return [denoiser(q.x, q.t, q.conditioning) for q in queries]
    many = len(queries) > 1
    x = torch.cat([q.x for q in queries]) if many else queries[0].x
    t: float | Tensor = queries[0].t
    if any(q.t != t for q in queries):
        t = torch.tensor([q.t for q in queries for _ in range(len(q.x))], dtype=torch.float64)
    conditioning = (
        _concatenate([q.conditioning for q in queries]) if many else queries[0].conditioning
    )
    x = x.float()
    if rows is None or len(x) <= rows:
        y = denoiser.output(x, t, conditioning)
    else:
        parts = [slice(i, i + rows) for i in range(0, len(x), rows)]
        y = torch.cat(
            [
                denoiser.output(x[p], t[p] if isinstance(t, Tensor) else t, conditioning[p])
                for p in parts
            ]
        )
    if not many:
        return [denoiser.split(x, y, queries[0].t)]
    predictions, start = [], 0
    for q in queries:
        end = start + len(q.x)
        predictions.append(
            denoiser.split(q.x if q.x.dtype == torch.float32 else q.x.float(), y[start:end], q.t)
        )
        start = end
    return predictions


def _concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Return the parts as one batch.

    In inference the first part caches the last batch that began with it: a run concatenates the
    same parts at every step.
    """
    if not torch.is_inference_mode_enabled():
        return Conditioning.cat(parts)
    others, batch = parts[0].__dict__.get("_concatenated", ((), None))
    if (
        batch is None
        or len(others) != len(parts) - 1
        or any(a is not b for a, b in zip(others, parts[1:], strict=True))
    ):
        batch = Conditioning.cat(parts)
        parts[0].__dict__["_concatenated"] = tuple(parts[1:]), batch
    return batch
