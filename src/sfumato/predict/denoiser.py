"""The denoiser: network + process, (x, t, conditioning) -> Prediction(x0, eps). Casts happen here
and nowhere else.

Coefficients are float64, the state float32, the network runs in its own dtype.
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
    """A network that speaks the process's parameterization. `t` is one number, or one an image
    (B,).
    """

    network: nn.Module
    process: Process

    def output(
        self, x: Float[Tensor, "B C h w"], t: float | Tensor, conditioning: Conditioning
    ) -> Float[Tensor, "B D h w"]:
        """The network's raw output y at x, float32, with the channels of a variance behind it where
        the network predicts one.
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
        """What the output y says of x. Twice as many channels as x has are a variance behind the
        target (arXiv:2102.09672, section 3.1).
        """
        channels = x.shape[1]
        found = self.process.split(x, y[:, :channels], t)
        return found.with_variance(y[:, channels:]) if y.shape[1] == 2 * channels else found

    @cached_property
    def _weight(self) -> tuple[nn.Module, str]:
        """Where the network's first weight is: its dtype is asked for at every call, and to look
        for it takes longer than to ask.
        """
        return next(
            (module, name)
            for module in self.network.modules()
            for name, _ in module.named_parameters(recurse=False)
        )

    def optimized(self, compile: bool = False) -> "Denoiser":
        """The same with a network made ready for inference where it is: see
        `LatentDiffusion.optimized`.
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
        """What x is made of, according to the network: x0 and eps, float32."""
        return self.split(x.float(), self.output(x, t, conditioning), t)


def answer(queries: Sequence[DenoiserCall], rows: int | None = None) -> list[Prediction]:
    """Answers questions, those that fit into one forward pass of the same denoiser together; `rows`
    bounds a pass's batch.

    Each answer is what its question alone would get: on the CPU in float32 to the last bit. A
    denoiser of another kind is called once a question; if it has an `answer(queries, one_pass)`,
    that is given all questions whose denoisers have the same `group`, and `one_pass`, which puts
    questions to a `Denoiser`.
    """
    if len(queries) == 1:
        return _one_pass(queries, rows)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, query in enumerate(queries):
        who = getattr(query.denoiser, "group", id(query.denoiser))
        groups.setdefault((who, query.x.shape[1:], query.conditioning.sizes), []).append(k)
    if len(groups) == 1:
        return _one_pass(queries, rows)
    found: dict[int, Prediction] = {}
    for members in groups.values():
        asked = [queries[k] for k in members]
        found |= zip(members, _one_pass(asked, rows), strict=True)
    return [found[k] for k in range(len(queries))]


def _one_pass(queries: Sequence[DenoiserCall], rows: int | None) -> list[Prediction]:
    """Answers to questions of one shape to one denoiser."""
    denoiser = queries[0].denoiser
    if hasattr(denoiser, "answer"):  # a wrapper's, which has something to do around the pass
        return denoiser.answer(queries, lambda ready: _one_pass(ready, rows))
    if not isinstance(denoiser, Denoiser):  # somebody else's, who may answer only one time at once
        return [denoiser(q.x, q.t, q.conditioning) for q in queries]
    many = len(queries) > 1
    x = torch.cat([q.x for q in queries]) if many else queries[0].x
    t: float | Tensor = queries[0].t
    if any(q.t != t for q in queries):
        t = torch.tensor([q.t for q in queries for _ in range(len(q.x))], dtype=torch.float64)
    conditioning = _joined([q.conditioning for q in queries]) if many else queries[0].conditioning
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
    answers, done = [], 0
    for q in queries:
        end = done + len(q.x)
        answers.append(
            denoiser.split(q.x if q.x.dtype == torch.float32 else q.x.float(), y[done:end], q.t)
        )
        done = end
    return answers


def _joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The parts as one batch. In inference the first part remembers the last join that it began: a
    run asks with the same at every step.
    """
    if not torch.is_inference_mode_enabled():
        return Conditioning.cat(parts)
    others, whole = parts[0].__dict__.get("_joined", ((), None))
    if (
        whole is None
        or len(others) != len(parts) - 1
        or any(a is not b for a, b in zip(others, parts[1:], strict=True))
    ):
        whole = Conditioning.cat(parts)
        parts[0].__dict__["_joined"] = tuple(parts[1:]), whole
    return whole
