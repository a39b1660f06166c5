"""Networks larger than memory: each layer's weights are there while it runs, and given back after
it.

A layer is a module with weights of its own and no modules inside. What is done with its weights
depends on where they lie:

    mapped   in a file, in the dtype that is computed in, on the CPU: the layer computes from the
             file's pages, which are dropped afterwards
    copied   anything else: they are converted, or sent to the device, into a ring of places that is
             used again (inference/offload/transfer.py)

Layers that follow are asked for while one runs. The order is what the last pass showed; before
that, the one in which they are registered. After a first pass it is known what a pass needs
besides; what is left of the memory given (`Memory`) then keeps layers from pass to pass, and only
the rest is streamed. A network whose turn is over gives all of it back to the next, so that text
encoders, denoiser and decoder never hold weights at the same time. Numbers are the plain network's,
bit for bit: the same kernels read the same weights.

Outside their turn copied weights are placeholders without memory, on the meta device (the first:
NaN, where the network is, for whoever asks a network where it is). To compute with one is an error,
and no wrong number. Who asks a layer for its weight by name, without running it, is given a copy.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.inference.offload.placeholders import MARK, Layer, computed, listed, with_access
from sfumato.inference.offload.transfer import Copies, OnCPU, OnGPU, Ring, padded, place, room
from sfumato.io import host_memory
from sfumato.io.safetensors import require_finite

SMALL = 2**16
"""Bytes of a layer up to which its weights stay: norms and the like, which are no burden and would
be many."""
AHEAD = 2**28
"""Bytes of mapped layers that the disk is asked for while one runs."""


class Memory:
    """What the process may take, in bytes (of the GPU's memory, if that is the device); the
    networks that stream in it take turns.
    """

    def __init__(self, limit: int, device: torch.device):
        self.limit, self.device = limit, device
        self.lock = threading.RLock()
        self.holder: Stream | None = None

    def now(self) -> int | None:
        """Bytes that are held."""
        return (
            torch.cuda.memory_reserved(self.device)
            if self.device.type == "cuda"
            else host_memory.held()
        )

    def peak(self) -> int | None:
        """The most that was held so far."""
        return (
            torch.cuda.max_memory_reserved(self.device)
            if self.device.type == "cuda"
            else host_memory.held(peak=True)
        )

    def spare(self) -> int:
        """Bytes that the peak so far leaves, less a little for what is not the same in every pass;
        below 0 where it was above the limit.
        """
        peak = self.peak()
        return 0 if peak is None else self.limit - self.limit // 32 - peak

    def turn(self, stream: "Stream") -> bool:
        """Makes it somebody's turn; whoever had it gives back what it held. False if it was
        theirs.
        """
        if self.holder is stream:
            return False
        if self.holder is not None:
            self.holder.release()
        self.holder = stream
        return True

    def release(self) -> None:
        """All weights go; the next layer that runs brings its own again."""
        with self.lock:
            if self.holder is not None:
                self.holder.release()
            self.holder = None


class Stream:
    """What brings the weights of one network and takes them away: see `stream`."""

    def __init__(self, network: nn.Module, memory: Memory, dtype: torch.dtype, where: object):
        self.memory, self.dtype, self.where = memory, dtype, where
        self.layers: list[Layer] = []
        self.resting: list[Tensor] = []  # stored tensors of what is always there
        device, files, wide = memory.device, host_memory.Mapped(), _wide(network, dtype)
        first = next(
            (
                module
                for module in network.modules()
                if any(p is not None for p in module._parameters.values())
            ),
            None,
        )
        for name, module in network.named_modules():
            own = {key: p.detach() for key, p in module._parameters.items() if p is not None}
            kind = torch.float32 if wide.intersection(name.split(".")) else dtype
            size = sum(t.numel() * computed(t, kind).itemsize for t in own.values())
            as_stored = device.type == "cpu" and all(
                t.dtype == computed(t, kind) for t in own.values()
            )
            mapped = as_stored and all(t in files for t in own.values())
            self._settle_buffers(module)
            if (
                size <= SMALL
                or next(module.children(), None) is not None
                or (as_stored and not mapped)
            ):
                self._settle(module, own, kind)
                continue
            layer = Layer(
                name,
                own,
                kind,
                mapped,
                isinstance(module, nn.Embedding),
                device if module is first else None,
            )
            self.layers.append(layer)
            if not mapped:
                module._parameters.update(layer.away)
                module.__class__ = with_access(type(module), tuple(own))
                module.__dict__[MARK] = self
            module.register_forward_pre_hook(_Hook(self, layer, self.begin), with_kwargs=True)
            module.register_forward_hook(
                _Hook(self, layer, self.end), with_kwargs=True, always_call=True
            )
            module.register_state_dict_post_hook(_Hook(self, layer, listed))
        # bytes of mapped layers that wait to be dropped: some are called again at once
        self.window = 2 * self._largest(mapped=True)
        self.ring_size = (3 if device.type == "cuda" else 2) * self._largest(mapped=False)
        self.files = files
        self.resting = [t for t in self.resting if t in files]
        self.after = dict(zip(self.layers, self.layers[1:], strict=False))
        self._forget()

    def _forget(self) -> None:
        """As before a first pass."""
        self.owner: int | None = None
        self.ring: Ring | None = None
        self.room: Tensor | None = None
        self.copies: Copies | None = None
        # the last one whose weights were asked for by name, with its own copy of them
        self.asked_for: Layer | None = None
        self.mark: Any = None
        # mapped layers that have run, whose pages are still there
        self.done: OrderedDict[Layer, None] = OrderedDict()
        self.asked: set[Layer] = set()
        self.first: Layer | None = None
        self.last: Layer | None = None
        self.seen = 0

    def _largest(self, mapped: bool) -> int:
        return max((layer.size for layer in self.layers if layer.mapped == mapped), default=0)

    @property
    def least(self) -> int:
        """Bytes of weights below which it cannot run: the largest layers, one asked for by name,
        and the pages that a copy is made from.
        """
        source = max(
            (
                sum(t.nbytes for t in layer.stored.values())
                for layer in self.layers
                if not layer.mapped
            ),
            default=0,
        )
        return (
            self.window
            + self.ring_size
            + self._largest(mapped=False)
            + (source if self.memory.device.type == "cpu" else 0)
        )

    def _settle(self, module: nn.Module, own: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Weights that are always there."""
        require_finite(own, self.where)
        for key, tensor in own.items():
            self.resting.append(tensor)
            settled = tensor.to(self.memory.device, computed(tensor, dtype))
            module._parameters[key] = nn.Parameter(settled, requires_grad=False)

    def _settle_buffers(self, module: nn.Module) -> None:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(self.memory.device, computed(buffer, self.dtype))

    # ---- a layer's turn --------------------------------------------------------------------------

    def begin(
        self, layer: Layer, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Before a layer runs: its weights come, those of the next ones are asked for."""
        _refuse_gradients(module, (*given, *named.values()))
        self.memory.lock.acquire()  # weights in the ring are one thread's at a time
        self._take_turn()
        self.owner = threading.get_ident()
        self._follow(layer)
        self._ask_ahead(layer)
        if layer.mapped:
            self.done.pop(layer, None)
        else:
            module._parameters.update(self._brought(layer))
        if not layer.looked:
            self._look(layer, module._parameters)

    def _take_turn(self) -> None:
        if self.memory.turn(self):
            self._forget()
            self.seen = self.memory.peak() or 0

    def by_name(self, layer: Layer, key: str) -> nn.Parameter:
        """A copied weight while its layer does not run. It is not in the ring: nobody knows how
        long it is held.
        """
        with self.memory.lock:
            self._take_turn()
            if self.asked_for is not layer or layer.kept is None:
                if self.asked_for is not None and not self.asked_for.stays:
                    self.asked_for.kept = None
                self.asked_for = layer
                weights = self._copied(layer, own=True)
                assert self.copies is not None and weights is not None and layer.copied is not None
                self.copies.wait(layer.copied[1])
            assert layer.kept is not None
            if not layer.looked:
                self._look(layer, layer.kept)
            return layer.kept[key]

    def end(self, layer: Layer, module: nn.Module, *_: Any) -> None:
        """After a layer has run, or failed."""
        if self.owner != threading.get_ident():  # it never began
            return
        if not layer.mapped:
            module._parameters.update(layer.away)
            self._bring_next(layer)
        elif not layer.stays:
            self.done[layer] = None
            while sum(other.size for other in self.done) > self.window:
                self._drop(self.done.popitem(last=False)[0])
        self.owner = None
        self.memory.lock.release()

    def _follow(self, layer: Layer) -> None:
        """Remembers the order; where a pass begins again, decides what stays."""
        if layer is self.last:
            return
        if self.last is not None:
            self.after[self.last] = layer
        if self.first is None:
            self.first = layer
        elif layer is self.first:
            self._share_out()
        self.last = layer

    def _share_out(self) -> None:
        """More layers stay, as far as the memory goes; fewer, if the last pass went beyond it."""
        spare, peak = self.memory.spare(), self.memory.peak() or 0
        if spare < 0 and peak > self.seen:
            for layer in reversed(self.layers):
                if layer.stays and spare < 0:
                    self._let_go(layer)
                    spare += layer.size
        else:
            for layer in self.layers:
                if not layer.stays and layer.size <= spare:
                    layer.stays = True
                    spare -= layer.size
        self.seen = peak

    def _look(self, layer: Layer, weights: Mapping[str, Tensor | None]) -> None:
        """`UserError` for NaN and infinity; of a table piece by piece, since most of it is not
        wanted otherwise.
        """
        for key in layer.stored:
            tensor = weights[key]
            assert tensor is not None
            for piece in tensor.detach().split(2**10) if layer.by_rows else (tensor.detach(),):
                require_finite({f"{layer.name}.{key}": piece}, self.where)
                if layer.by_rows:
                    host_memory.drop(piece)
        layer.looked = True

    # ---- mapped ----------------------------------------------------------------------------------

    def _ask_ahead(self, layer: Layer) -> None:
        self.asked.discard(layer)
        left, at = AHEAD, layer
        while (at := self.after.get(at)) is not None and at is not layer and at.size <= left:
            left -= at.size
            if at.stays or at.by_rows or at in self.asked:
                continue
            self.asked.add(at)
            for tensor in at.stored.values():
                if tensor in self.files:
                    host_memory.ask(tensor)

    def _drop(self, layer: Layer) -> None:
        for tensor in layer.stored.values():
            if tensor in self.files:
                host_memory.drop(tensor)

    # ---- copied ----------------------------------------------------------------------------------

    def _brought(self, layer: Layer) -> dict[str, nn.Parameter]:
        """A layer's weights on the device."""
        weights = self._copied(layer)
        assert self.copies is not None and weights is not None and layer.copied is not None
        self.copies.wait(layer.copied[1])
        self.mark = self.copies.mark()
        return weights

    def _bring_next(self, layer: Layer) -> None:
        """After a layer was asked to compute: the weights of the next one are sent meanwhile."""
        follows = self.after.get(layer)
        if (
            self.copies is not None
            and self.copies.ahead
            and follows is not None
            and not (follows.mapped or follows.stays)
        ):
            self._copied(follows, layer, self.mark)

    def _copied(
        self, layer: Layer, keep: Layer | None = None, since: Any = None, own: bool = False
    ) -> dict[str, nn.Parameter] | None:
        """A layer's weights in the ring, or in their `own` room, as those that stay; None if `keep`
        would lose its place.
        """
        if self.ring is None:
            self.ring, self.room = Ring(self.ring_size), room(self.ring_size, self.memory.device)
            self.copies = (
                OnCPU()
                if self.memory.device.type == "cpu"
                else OnGPU(self.memory.device, self.ring_size // 3)
            )
        assert self.room is not None and self.copies is not None
        if layer.kept is not None:
            return layer.kept
        own = own or layer.stays
        if not own and layer.copied is not None and self.ring.find(layer) is not None:
            return layer.copied[0]
        at, mine = (
            (0, room(layer.size, self.memory.device))
            if own
            else (self.ring.take(layer, layer.size, keep), self.room)
        )
        if at is None:
            return None
        pairs, weights = [], {}
        for key, tensor in layer.stored.items():
            to = place(mine, at, layer.dtypes[key], tensor.shape)
            pairs.append((to, tensor))
            weights[key] = nn.Parameter(to, requires_grad=False)
            at += padded(to.nbytes)
        layer.copied = weights, self.copies.write(pairs, since)
        layer.kept = weights if own else None
        self._drop(layer)
        return weights

    # ---- all of it -------------------------------------------------------------------------------

    def _let_go(self, layer: Layer) -> None:
        layer.stays, layer.kept, layer.copied = False, None, None
        self._drop(layer)

    def release(self) -> None:
        """Gives back what is held between layers. Which layers stay is remembered for the next
        turn.
        """
        if self.copies is not None:
            self.copies.finish()
        for layer in self.layers:
            layer.kept = layer.copied = None
            self._drop(layer)
        for tensor in self.resting:
            host_memory.drop(tensor)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stream":
        return self  # copies of a network have the same weights


class _Hook:
    """A hook that copies of a module share: they have the same weights."""

    def __init__(self, stream: Stream, layer: Layer, call: Any):
        self.stream, self.layer, self.call = stream, layer, call

    def __call__(self, *given: Any) -> Any:
        return self.call(self.layer, *given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return self


def _wide(network: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of the modules that transformers keeps in float32 where the rest is in float16, as
    T5's, which overflows.
    """
    return (
        set(getattr(network, "_keep_in_fp32_modules", None) or ())
        if dtype == torch.float16
        else set()
    )


def _refuse_gradients(module: nn.Module, given: tuple[Any, ...]) -> None:
    wanted = any(p is not None and p.requires_grad for p in module._parameters.values())
    asked = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in given
    )
    if wanted or asked:
        raise UserError(
            "a network whose weights are streamed has no gradients: open the model without memory= to train it"
        )


def _refuse_weights(*_: Any, **__: Any) -> None:
    raise UserError(
        "a network whose weights are streamed takes no others, and stays where it is and in its dtype: open the model without memory="
    )


def stream(network: nn.Module, memory: Memory, dtype: torch.dtype, where: object) -> nn.Module:
    """Makes a network, given with its weights as they are stored, stream them from now on, and
    returns it.

    It computes in `dtype` on the memory's device. where: what the weights were read from, for what
    is said about them: `UserError` for NaN and infinity when a weight is first used. Weights that
    lie in no file and need no conversion stay where they are. The network has no gradients then,
    takes no other weights, and stays where it is.
    """
    made = Stream(network, memory, dtype, where)
    network.__dict__[MARK] = made
    network.__dict__["_apply"] = _refuse_weights  # .to(), .float() and the like
    network.register_load_state_dict_pre_hook(_refuse_weights)
    return network.eval()


def streamed(network: nn.Module) -> Stream | None:
    """What streams a network's weights, if something does. Copies of a network know theirs too."""
    return network.__dict__.get(MARK)
