"""Counts of opened tensors of a file: by safetensors, torch and gguf."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import safetensors
import torch


@contextmanager
def opens() -> Iterator[Counter[str]]:
    """The number of times that each file is opened inside, by its name below its folder."""
    counts: Counter[str] = Counter()

    def counting(open_file: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            counts["/".join(Path(path).parts[-2:])] += 1
            return open_file(path, *arguments, **options)

        return opened

    with (
        patch.object(safetensors, "safe_open", counting(safetensors.safe_open)),
        patch("safetensors.torch.load_file", counting(safetensors.torch.load_file)),
        patch.object(torch, "load", counting(torch.load)),
        patch.object(gguf, "GGUFReader", counting(gguf.GGUFReader)),
    ):
        yield counts
