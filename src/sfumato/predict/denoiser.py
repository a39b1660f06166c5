"""The denoiser: network + process, (x, t, conditioning) -> Prediction(x0, eps).

Casts happen here and nowhere else: coefficients are float64, the state float32, and the network
runs in its own dtype. `evaluate_calls` batches the denoiser calls of many runs.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.batching import BatchingDenoiser, DenoiserCall
from sfumato.diffuse.process import Process
from sfumato.inference.prepack import can_prepack, clone_sharing_weights, compile_network, prepack
from sfumato.inference.threads import ThreadChoice
from sfumato.kernels.batch_invariant import applies
from sfumato.predict.networks.base import Network
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
        weight = getattr(module, name)
        dtype = weight.dtype
        timestep = self.process.timestep(t, x.device).expand(len(x))
        network_input = self.process.network_input(x, t).to(dtype)
        conditioning = conditioning.to(x.device, dtype)

        def call() -> Tensor:
            return self.network(network_input, timestep, conditioning).float()

        if not applies(network_input, weight):
            return call()
        return self._threads((x.shape, conditioning.sizes), call)

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

    # ---- the network; networks of other classes than `Network` check their inputs themselves -----

    @property
    def guidance_embeds(self) -> bool:
        """True for a guidance-distilled network."""
        return isinstance(self.network, Network) and self.network.guidance_embeds

    @property
    def learned_variance(self) -> bool:
        """True if the network may predict a variance."""
        return not isinstance(self.network, Network) or self.network.learned_variance

    @property
    def patch(self) -> int:
        """Latent cells along a side of one of the network's tokens."""
        return self.network.patch if isinstance(self.network, Network) else 1

    @property
    def classes(self) -> int:
        """Rows of the network's table of classes; 0: no classes."""
        return self.network.classes if isinstance(self.network, Network) else 0

    @property
    def sample_size(self) -> int:
        """The default side of latents, in cells."""
        if isinstance(self.network, Network):
            return self.network.sample_size
        config = self.network.config  # of diffusers' networks
        return getattr(config, "sample_size", None) or 64

    @cached_property
    def _threads(self) -> ThreadChoice:
        """The number of threads of the network's calls, by their sizes."""
        return ThreadChoice()

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
            clone = clone_sharing_weights(self.network)
            network = clone.to(memory_format=torch.channels_last)  # pyright: ignore
        return replace(self, network=network)

    def __call__(
        self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning
    ) -> Prediction:
        """Predict x0 and eps, float32, of x at t, one time or one an image (B,)."""
        return self.split(x.float(), self.output(x, t, conditioning), t)


def evaluate_calls(calls: Sequence[DenoiserCall], rows: int | None = None) -> list[Prediction]:
    """Evaluate denoiser calls, batching those that fit into one forward pass.

    Each prediction is that of its call alone: on the CPU in float32 to the last bit. A denoiser of
    another class is called once a call, but for a `BatchingDenoiser`.

    Args:
        calls: The calls.
        rows: Largest batch of a forward pass; None: no limit.

    Returns:
        One prediction a call.
    """
    groups: dict[Hashable, list[int]] = {}
    for k, call in enumerate(calls):
        batches = isinstance(call.denoiser, BatchingDenoiser)
        key = call.denoiser.batch_key if batches else id(call.denoiser)
        groups.setdefault((key, call.x.shape[1:], call.conditioning.sizes), []).append(k)
    if len(groups) == 1:
        return _forward(calls, rows)
    predictions: dict[int, Prediction] = {}
    for members in groups.values():
        predictions |= zip(members, _forward([calls[k] for k in members], rows), strict=True)
    return [predictions[k] for k in range(len(calls))]


def _forward(calls: Sequence[DenoiserCall], rows: int | None) -> list[Prediction]:
    """Evaluate calls of one shape to one denoiser."""
    denoiser, first = calls[0].denoiser, calls[0]
    if isinstance(denoiser, BatchingDenoiser):
        return denoiser.evaluate_calls(calls, lambda ready: _forward(ready, rows))
    if not isinstance(denoiser, Denoiser):  # of another class, which may take only one time at once
        return [denoiser(call.x, call.t, call.conditioning) for call in calls]
    x, conditioning = first.x.float(), first.conditioning
    t: float | Tensor = first.t
    if len(calls) > 1:
        x = torch.cat([call.x for call in calls]).float()
        conditioning = _concatenate([call.conditioning for call in calls])
        if any(call.t != t for call in calls):
            times = [call.t for call in calls for _ in range(len(call.x))]
            t = torch.tensor(times, dtype=torch.float64)
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
    # Predictions at one x stay predictions at one x: guidance combines their outputs then.
    outputs = y.split([len(call.x) for call in calls])
    return [
        denoiser.split(call.x.float(), output, call.t)
        for call, output in zip(calls, outputs, strict=True)
    ]


def _concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Return the parts as one batch.

    In inference the first part caches the last batch that began with it: a run concatenates the
    same parts at every step.
    """
    if not torch.is_inference_mode_enabled():
        return Conditioning.cat(parts)
    others, batch = parts[0].__dict__.get("_concatenated", ((), None))
    if batch is None or [*map(id, others)] != [*map(id, parts[1:])]:
        batch = Conditioning.cat(parts)
        parts[0].__dict__["_concatenated"] = tuple(parts[1:]), batch
    return batch
