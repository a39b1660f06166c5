"""Bytes that a computation allocates, counted on the meta device: shapes without numbers."""

from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counting(TorchDispatchMode):
    """Counts the bytes of tensors that live at the same time; `most` is their maximum.

    Tensors that exist before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs or {}))
            if isinstance(t, Tensor)
        }
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor, inputs)
        return outputs

    def _add(self, tensor: Tensor, inputs: set[int]) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if storage in inputs and storage not in self._users:  # a view of an earlier tensor
            return
        if storage not in self._users:
            self.now += size
            self.most = max(self.most, self.now)
        self._users[storage] = self._users.get(storage, 0) + 1
        finalize(tensor, self._remove, storage, size)

    def _remove(self, storage: int, size: int) -> None:
        self._users[storage] -= 1
        if not self._users[storage]:
            del self._users[storage]
            self.now -= size


class _Fused(TorchFunctionMode):
    """Attention without a table of scores, as in fused kernels."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> int:
    """Return the most bytes of tensors that live at once while `run` runs on the meta device."""
    with torch.inference_mode(), torch.device("meta"), _Fused(), _Counting() as counting:
        _ = run()
    return counting.most
