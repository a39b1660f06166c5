"""This machine: its processor, its methods for layers, and a check of batch invariance.

Batch invariance means that an image does not depend on its batch.
"""

import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.kernels.measured import LIMITS, measurements
from sfumato.kernels.mkl_threads import controlled

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BATCHES = (2, 3, 7, 17)
"""Batch sizes that are compared with images computed alone."""

_SETS = (
    "sse4_2 avx avx2 fma3 f16c avx_vnni avx512_f avx512_bw avx512_vnni avx512_bf16 avx512_fp16 "
    "avx10_1 avx10_2 amx_tile amx_int8 amx_bf16 amx_fp16 neon dotprod bf16 i8mm sve sve2 sme"
).split()


def report() -> dict[str, Any]:
    """Describe this machine, as JSON.

    It has the processor, threads, libraries, methods, the times of kernels that were measured
    (kernels/measured.py), and the result of `check_layers`.
    """
    return {
        "processor": processor(),
        "threads": {"of torch": torch.get_num_threads(), "cores for this process": _cores()},
        "libraries": {
            "torch": str(torch.__version__),
            **_libraries(),
            "vector instructions of torch": torch.backends.cpu.get_cpu_capability(),
        },
        "limits in the environment": {
            name: os.environ[name] for name in LIMITS if name in os.environ
        },
        "accelerators": _accelerators(),
        "methods": methods(),
        "kernels measured here": {
            kind: ", ".join(f"{name} {1000 * time:.3g} ms" for name, time in seconds.items())
            for kind, seconds in measurements().items()
        },
        "images do not depend on the batch": check_layers(),
    }


def processor() -> dict[str, Any]:
    """Describe the processor: name, architecture, instruction sets and caches."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = str(capabilities.get("cpu_name") or platform.processor() or "unknown")
    sets = [key for key in _SETS if capabilities.get(key)]
    if not capabilities:
        checks = {"avx2": "avx2", "avx512_f": "avx512", "amx_tile": "amx_tile"}
        sets = [k for k, v in checks.items() if getattr(torch.cpu, f"_is_{v}_supported", bool)()]
    caches = {
        level: int(size)
        for level in ("l1d", "l2")
        if (size := capabilities.get(f"{level}_cache_size"))
    }
    return {
        "name": f"{name}{_model()}",
        "architecture": platform.machine(),
        "instruction sets": sets,
        "caches": caches,
    }


def methods() -> dict[str, str]:
    """Describe the methods that compute the layers of a network on the CPU, by dtype."""
    layers = {dtype: nn.Sequential(nn.Linear(8, 8, dtype=dtype)) for dtype in _DTYPES}
    packed = {dtype: can_prepack(layer) for dtype, layer in layers.items()}
    fused, blocks = "torch's fused kernel", "in blocks, by oneDNN"
    return {
        "linear and convolution, float32": batch_invariant.method(),
        "attention, float32": fused + (", MKL on one thread" if controlled() else ""),
        "attention of many tokens, bfloat16": blocks if packed[torch.bfloat16] else fused,
    } | {
        f"prepared networks, {name}": "weights packed for oneDNN"
        if packed[dtype]
        else "as they are"
        for dtype, name in _DTYPES.items()
    }


def check_layers() -> dict[str, bool]:
    """Compare images in batches with the same images alone, bit for bit.

    Each kind of layer is checked. It takes about a second.
    """
    with torch.inference_mode():
        return {name: _same(function, x) for name, function, x in _layers()}


def _layers() -> Iterator[tuple[str, Callable[[Tensor], Tensor], Tensor]]:
    """Yield (name, function of a batch, images), in float32 on the CPU.

    Torch's random state does not change.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def filled(layer: nn.Module) -> nn.Module:
        for parameter in layer.parameters():
            parameter.data = normal(*parameter.shape) / 8
        return layer.eval()

    count = max(BATCHES) + 1
    for d, e in ((64, 256), (256, 128), (320, 1280), (1280, 320)):
        layer = filled(batch_invariant.Linear(d, e))
        yield f"linear {d} to {e}", layer, normal(count, d)
        yield f"linear {d} to {e}, 5 tokens", layer, normal(count, 5, d)
    for c, d, kernel, stride, side in (
        (4, 64, 3, 1, 8),
        (128, 64, 3, 1, 7),
        (640, 640, 3, 1, 4),
        (320, 64, 3, 2, 8),
        (640, 96, 1, 1, 4),
    ):
        layer = filled(batch_invariant.Conv2d(c, d, kernel, stride, kernel // 2))
        x = normal(count, c, side, side)
        name = f"convolution {kernel}x{kernel} of {c} to {d} channels, stride {stride}"
        yield name, layer, x
        if can_prepack(layer):
            yield f"prepared {name}", prepack(nn.Sequential(layer)), x
    yield "group norm", filled(batch_invariant.GroupNorm(4, 24)), normal(count, 24, 7, 5)
    yield "layer norm", nn.LayerNorm(77), normal(count, 5, 77)
    for name, function in (
        ("SiLU", batch_invariant.silu),
        ("GELU", batch_invariant.gelu),
        ("GELU by tanh", lambda x: batch_invariant.gelu(x, tanh=True)),
    ):
        yield name, function, normal(count, 7, 5)
    for length in (9, 49, 256):
        yield f"attention of {length} tokens", _attention, normal(count, length, 3 * 80)


def _attention(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, -1)
    return batch_invariant.attention(q, k, v, 2)


def _same(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return True if images have the same bits alone and in batches from image 0 and image 1."""
    alone = torch.cat([function(x[i : i + 1].clone()) for i in range(len(x))])
    return all(
        torch.equal(function(x[first : first + size].clone()), alone[first : first + size])
        for size in BATCHES
        for first in (0, 1)
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _model() -> str:
    """Return vendor, family and model as Linux numbers them; "AMD EPYC" and such omit them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ""
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    entries = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    labels = {"vendor_id": "", "cpu family": "family ", "model": "model "}
    parts = [f"{label}{entries[key].strip()}" for key, label in labels.items() if key in entries]
    return f" ({', '.join(parts)})" if parts else ""


def _libraries() -> dict[str, str]:
    """Return the versions of oneDNN and MKL that torch was built with."""
    config, versions = torch.__config__.show(), {}
    for name, mark in (("oneDNN", "MKL-DNN v"), ("MKL", "Math Kernel Library Version ")):
        match = re.search(rf"{mark}([^\s-]+)", config)
        versions[name] = "none" if match is None else match[1]
    return versions


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return ["MPS"] if torch.backends.mps.is_available() else []
