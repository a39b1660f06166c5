"""Weight streaming: layer-wise offload of networks larger than memory.

A layer is a module with parameters of its own and no submodules. Its weights are in memory while it
runs. There are two kinds, by their place:

    mapped   in a file, in the compute dtype, on the CPU: the layer computes from the file's pages,
             which are dropped afterwards
    copied   all others: converted, or sent to the device, into a ring buffer
             (inference/offload/transfer.py)

The next layers are prefetched while one runs, in the order of the last pass; before a first pass,
in order of registration. The first pass shows how much memory a pass needs besides weights. What
remains of the budget (`MemoryBudget`) keeps layers resident from pass to pass, and only the rest is
streamed. A network releases all its memory to the next one, so that text encoders, denoiser and
decoder never hold weights at the same time. Results are the plain network's, bit for bit: the same
kernels read the same weights.

Copied weights are placeholders while their layer does not run (inference/offload/placeholders.py).
The network's first parameter is a NaN on its device, so that code that looks up the device works.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import UserError
from sfumato.inference.offload.placeholders import (
    MARK,
    OffloadedLayer,
    compute_dtype,
    put_placeholders,
    with_weight_access,
)
from sfumato.inference.offload.transfer import (
    CPUTransfer,
    GPUTransfer,
    Ring,
    Transfer,
    aligned_size,
    allocate,
    view_at,
)
from sfumato.io import host_memory
from sfumato.io.safetensors import require_finite

SMALL = 2**16
"""Bytes of a layer up to which its weights stay resident: norms and the like."""
AHEAD = 2**28
"""Bytes of mapped layers that are prefetched while one runs."""


class MemoryBudget:
    """Memory that the process may use, in which networks take turns.

    Args:
        limit: bytes; of the GPU's memory where that is the device.
        device: the device that networks compute on.
    """

    SHARE = 32
    """One part of so many of the limit is left for differences between passes."""

    def __init__(self, limit: int, device: torch.device):
        self.limit, self.device = limit, device
        self.lock = threading.RLock()
        self.holder: WeightStreamer | None = None

    def now(self) -> int | None:
        """Return the bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return host_memory.resident_bytes()

    def peak(self) -> int | None:
        """Return the peak of the bytes in use."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return host_memory.resident_bytes(peak=True)

    def spare(self) -> int:
        """Return the bytes that the peak leaves of the limit; negative above the limit.

        One part in `SHARE` is left for differences between passes.
        """
        peak = self.peak()
        return 0 if peak is None else self.limit - self.limit // self.SHARE - peak

    def free(self) -> int:
        """Return the bytes that the limit leaves beside all that is no streamed weight."""
        if self.device.type == "cpu":
            host_memory.trim()
        held = 0 if self.holder is None else self.holder.held
        return self.limit - self.limit // self.SHARE - max((self.now() or 0) - held, 0)

    def turn(self, streamer: "WeightStreamer") -> bool:
        """Give a network the turn; the last holder releases its memory. False if it had it."""
        if self.holder is streamer:
            return False
        if self.holder is not None:
            self.holder.release()
            if self.device.type == "cpu":
                host_memory.trim()
        self.holder = streamer
        return True

    def release(self) -> None:
        """Release all weights; the next layer that runs loads its own again."""
        with self.lock:
            if self.holder is not None:
                self.holder.release()
            self.holder = None
            if self.device.type == "cpu":
                host_memory.trim()


class WeightStreamer:
    """Loads and releases the weights of one network, see `stream_weights`."""

    def __init__(self, network: nn.Module, memory: MemoryBudget, dtype: torch.dtype, where: object):
        self.memory, self.dtype, self.where = memory, dtype, where
        self.layers: list[OffloadedLayer] = []
        self.resident: list[Tensor] = []  # stored tensors of resident weights
        device, files, wide = memory.device, host_memory.MappedRanges(), _wide(network, dtype)
        owners = (
            m for m in network.modules() if next(m.parameters(recurse=False), None) is not None
        )
        first = next(owners, None)
        for name, module in network.named_modules():
            own = {key: p.detach() for key, p in module._parameters.items() if p is not None}
            kind = torch.float32 if wide.intersection(name.split(".")) else dtype
            size = sum(t.numel() * compute_dtype(t, kind).itemsize for t in own.values())
            converted = any(t.dtype != compute_dtype(t, kind) for t in own.values())
            as_stored = device.type == "cpu" and not converted
            mapped = as_stored and all(t in files for t in own.values())
            self._place_buffers(module)
            inner = next(module.children(), None) is not None
            if size <= SMALL or inner or (as_stored and not mapped):
                self._place(module, own, kind)
                continue
            by_rows, at = isinstance(module, nn.Embedding), device if module is first else None
            layer = OffloadedLayer(name, own, kind, mapped, by_rows, at)
            self.layers.append(layer)
            if not mapped:
                module._parameters.update(layer.placeholders)
                module.__class__ = with_weight_access(type(module), tuple(own))
                module.__dict__[MARK] = self
            module.register_forward_pre_hook(_Hook(self, layer, self.begin), with_kwargs=True)
            end = _Hook(self, layer, self.end)
            module.register_forward_hook(end, with_kwargs=True, always_call=True)
            module.register_state_dict_post_hook(_Hook(self, layer, put_placeholders))
        # Bytes of mapped layers that are kept before they are dropped: some run again at once.
        self.window = 2 * self._largest(mapped=True)
        self.ring_size = (3 if device.type == "cuda" else 2) * self._largest(mapped=False)
        self.files = files
        self.resident = [t for t in self.resident if t in files]
        self.after = dict(zip(self.layers, self.layers[1:], strict=False))
        self._reset()

    def _reset(self) -> None:
        """Return to the state before a first pass."""
        self.owner: int | None = None
        self.ring: Ring | None = None
        self.buffer: Tensor | None = None
        self.transfer: Transfer | None = None
        # the last layer whose weights were read by name; it has its own copy
        self.named_layer: OffloadedLayer | None = None
        self.mark: Any = None
        # mapped layers that have run and whose pages are not dropped yet
        self.done: OrderedDict[OffloadedLayer, None] = OrderedDict()
        self.prefetched: set[OffloadedLayer] = set()
        self.first: OffloadedLayer | None = None
        self.last: OffloadedLayer | None = None
        self.last_peak = 0

    def _largest(self, mapped: bool) -> int:
        return max((layer.size for layer in self.layers if layer.mapped == mapped), default=0)

    @property
    def least(self) -> int:
        """Least bytes of weights in memory.

        These are the largest layers, one more read by name, and the pages that copies read from.
        """
        copied = (layer.stored.values() for layer in self.layers if not layer.mapped)
        pages = max((sum(t.nbytes for t in tensors) for tensors in copied), default=0)
        pages = pages if self.memory.device.type == "cpu" else 0
        return self.window + self.ring_size + self._largest(mapped=False) + pages

    @property
    def held(self) -> int:
        """Bytes of weights that are in memory, as far as is known, without resident ones."""
        buffer = 0 if self.buffer is None else self.buffer.nbytes
        layers = (x for x in self.layers if x.stays or x.kept is not None or x in self.done)
        return buffer + sum(layer.size for layer in layers)

    def make_room(self, size: int) -> None:
        """Release other networks' weights, and own ones where feature maps need their memory.

        Args:
            size: bytes of feature maps of the coming passes.
        """
        with self.memory.lock:
            # layers that rows pass through do not take it themselves
            self._take_turn()
            used = (self.memory.now() or 0) + size
            if used > self.memory.limit - self.memory.limit // self.memory.SHARE:
                self.memory.release()
                for layer in self.layers:
                    layer.stays = False

    def _place(self, module: nn.Module, own: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Make weights resident."""
        require_finite(own, self.where)
        for key, tensor in own.items():
            self.resident.append(tensor)
            parameter = tensor.to(self.memory.device, compute_dtype(tensor, dtype))
            module._parameters[key] = nn.Parameter(parameter, requires_grad=False)

    def _place_buffers(self, module: nn.Module) -> None:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                dtype = compute_dtype(buffer, self.dtype)
                module._buffers[key] = buffer.to(self.memory.device, dtype)

    # ---- a layer's turn --------------------------------------------------------------------------

    def begin(
        self,
        layer: OffloadedLayer,
        module: nn.Module,
        inputs: tuple[Any, ...],
        named: dict[str, Any],
    ) -> None:
        """Forward pre-hook: load the layer's weights and prefetch the next ones."""
        _refuse_gradients(module, (*inputs, *named.values()))
        self.memory.lock.acquire()  # one thread at a time uses the ring
        self._take_turn()
        self.owner = threading.get_ident()
        self._follow(layer)
        self._prefetch(layer)
        if layer.mapped:
            self.done.pop(layer, None)
        else:
            module._parameters.update(self._weights_of(layer))
        if not layer.checked:
            self._check_finite(layer, module._parameters)

    def _take_turn(self) -> None:
        if self.memory.turn(self):
            self._reset()
            self.last_peak = self.memory.peak() or 0

    def by_name(self, layer: OffloadedLayer, key: str) -> nn.Parameter:
        """Return a copied weight while its layer does not run.

        It lies outside the ring, since the caller may keep it.
        """
        with self.memory.lock:
            self._take_turn()
            if self.named_layer is not layer or layer.kept is None:
                if self.named_layer is not None and not self.named_layer.stays:
                    self.named_layer.kept = None
                self.named_layer = layer
                self._copy_and_wait(layer, own=True)
            assert layer.kept is not None
            if not layer.checked:
                self._check_finite(layer, layer.kept)
            return layer.kept[key]

    def end(self, layer: OffloadedLayer, module: nn.Module, *_: Any) -> None:
        """Forward hook: release the layer's weights after it has run or failed."""
        if self.owner != threading.get_ident():  # it never began
            return
        if not layer.mapped:
            module._parameters.update(layer.placeholders)
            self._copy_next(layer)
        elif not layer.stays:
            self.done[layer] = None
            while sum(other.size for other in self.done) > self.window:
                self._drop(self.done.popitem(last=False)[0])
        self.owner = None
        self.memory.lock.release()

    def _follow(self, layer: OffloadedLayer) -> None:
        """Record the order of layers; at the start of a pass choose the resident ones."""
        if layer is self.last:
            return
        if self.last is not None:
            self.after[self.last] = layer
        if self.first is None:
            self.first = layer
        elif layer is self.first:
            self._choose_resident()
        self.last = layer

    def _choose_resident(self) -> None:
        """Keep more layers resident, or fewer where the last pass exceeded the limit."""
        spare, peak = self.memory.spare(), self.memory.peak() or 0
        if spare < 0 and peak > self.last_peak:
            for layer in reversed(self.layers):
                if layer.stays and spare < 0:
                    self._release_layer(layer)
                    spare += layer.size
        else:
            for layer in self.layers:
                if not layer.stays and layer.size <= spare:
                    layer.stays = True
                    spare -= layer.size
        self.last_peak = peak

    def _check_finite(self, layer: OffloadedLayer, weights: Mapping[str, Tensor | None]) -> None:
        """Raise `UserError` for NaN and infinity; embedding tables are read piece by piece."""
        for key in layer.stored:
            tensor = weights[key]
            assert tensor is not None
            for piece in tensor.detach().split(2**10) if layer.by_rows else (tensor.detach(),):
                require_finite({f"{layer.name}.{key}": piece}, self.where)
                if layer.by_rows:
                    host_memory.drop_pages(piece)
        layer.checked = True

    # ---- mapped ----------------------------------------------------------------------------------

    def _prefetch(self, layer: OffloadedLayer) -> None:
        self.prefetched.discard(layer)
        left, at = AHEAD, layer
        while (at := self.after.get(at)) is not None and at is not layer and at.size <= left:
            left -= at.size
            if at.stays or at.by_rows or at in self.prefetched:
                continue
            self.prefetched.add(at)
            for tensor in at.stored.values():
                if tensor in self.files:
                    host_memory.prefetch_pages(tensor)

    def _drop(self, layer: OffloadedLayer) -> None:
        for tensor in layer.stored.values():
            if tensor in self.files:
                host_memory.drop_pages(tensor)

    # ---- copied ----------------------------------------------------------------------------------

    def _weights_of(self, layer: OffloadedLayer) -> dict[str, nn.Parameter]:
        """Return a layer's weights on the device."""
        weights, transfer = self._copy_and_wait(layer)
        self.mark = transfer.mark()
        return weights

    def _copy_and_wait(
        self, layer: OffloadedLayer, own: bool = False
    ) -> tuple[dict[str, nn.Parameter], Transfer]:
        weights = self._copy(layer, own=own)
        assert self.transfer is not None and weights is not None and layer.copied is not None
        self.transfer.wait(layer.copied[1])
        return weights, self.transfer

    def _copy_next(self, layer: OffloadedLayer) -> None:
        """Start to copy the next layer's weights while this one computes."""
        follows = self.after.get(layer)
        if self.transfer is None or not self.transfer.ahead or follows is None:
            return
        if not (follows.mapped or follows.stays):
            self._copy(follows, layer, self.mark)

    def _copy(
        self,
        layer: OffloadedLayer,
        keep: OffloadedLayer | None = None,
        since: Any = None,
        own: bool = False,
    ) -> dict[str, nn.Parameter] | None:
        """Copy a layer's weights into the ring, or into a buffer of their `own`.

        Layers that stay have a buffer of their own. Returns None if `keep` would lose its bytes.
        """
        device = self.memory.device
        if self.ring is None:
            self.ring, self.buffer = Ring(self.ring_size), allocate(self.ring_size, device)
            cpu = device.type == "cpu"
            self.transfer = CPUTransfer() if cpu else GPUTransfer(device, self.ring_size // 3)
        assert self.buffer is not None and self.transfer is not None
        if layer.kept is not None:
            return layer.kept
        own = own or layer.stays
        if not own and layer.copied is not None and self.ring.find(layer) is not None:
            return layer.copied[0]
        if own:
            at, buffer = 0, allocate(layer.size, device)
        else:
            at, buffer = self.ring.take(layer, layer.size, keep), self.buffer
        if at is None:
            return None
        pairs, weights = [], {}
        for key, tensor in layer.stored.items():
            to = view_at(buffer, at, layer.dtypes[key], tensor.shape)
            pairs.append((to, tensor))
            weights[key] = nn.Parameter(to, requires_grad=False)
            at += aligned_size(to.nbytes)
        layer.copied = weights, self.transfer.write(pairs, since)
        layer.kept = weights if own else None
        self._drop(layer)
        return weights

    # ---- all of it -------------------------------------------------------------------------------

    def _release_layer(self, layer: OffloadedLayer) -> None:
        layer.stays, layer.kept, layer.copied = False, None, None
        self._drop(layer)

    def release(self) -> None:
        """Release all memory. The choice of resident layers is kept for the next turn."""
        if self.transfer is not None:
            self.transfer.finish()
        for layer in self.layers:
            layer.kept = layer.copied = None
            self._drop(layer)
        for tensor in self.resident:
            host_memory.drop_pages(tensor)
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightStreamer":
        return self  # copies of a network have the same weights


class _Hook:
    """A hook that copies of a module share, since they share the weights."""

    def __init__(self, streamer: WeightStreamer, layer: OffloadedLayer, call: Any):
        self.streamer, self.layer, self.call = streamer, layer, call

    def __call__(self, *inputs: Any) -> Any:
        return self.call(self.layer, *inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return self


def _wide(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of modules that transformers keeps in float32 beside float16.

    T5 has such modules, which overflow in float16.
    """
    names = getattr(module, "_keep_in_fp32_modules", None) or ()
    return set(names) if dtype == torch.float16 else set()


def _refuse_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    tensors = [*module._parameters.values()]
    if torch.is_grad_enabled():
        tensors += [x for x in inputs if isinstance(x, Tensor)]
    if any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise UserError(
            "a network whose weights are streamed has no gradients: "
            "open the model without memory= to train it"
        )


def _refuse_weights(*_: Any, **__: Any) -> None:
    raise UserError(
        "a network whose weights are streamed keeps its weights, device and dtype: "
        "open the model without memory="
    )


def stream_weights(
    network: nn.Module, memory: MemoryBudget, dtype: torch.dtype, where: object
) -> nn.Module:
    """Make a network stream its weights, in place.

    Weights that are not mapped from a file and need no conversion stay as they are. Afterwards the
    network has no gradients, and its weights, device and dtype are fixed.

    Args:
        network: has its weights as they are stored.
        memory: the budget, and the device to compute on.
        dtype: compute dtype.
        where: source of the weights, for messages.

    Raises:
        UserError: when a weight with NaN or infinity is first used.
    """
    streamer = WeightStreamer(network, memory, dtype, where)
    network.__dict__[MARK] = streamer
    network.__dict__["_apply"] = _refuse_weights  # .to(), .float() and the like
    network.register_load_state_dict_pre_hook(_refuse_weights)
    return network.eval()


def streamer_of(network: nn.Module) -> WeightStreamer | None:
    """Return the streamer of a network or of its copy, None for plain networks."""
    return network.__dict__.get(MARK)
