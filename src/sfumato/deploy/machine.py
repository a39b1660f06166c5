"""This machine: its processor, how layers are computed on it, and a check that an image does not
depend on its batch.
"""

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.inference.prepack import can_prepack, prepack
from sfumato.kernels import batch_invariant
from sfumato.kernels.mkl_threads import controlled

BATCHES = (2, 3, 7, 17)
"""Batch sizes that are compared with images computed alone."""

LIMITS = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)
LIMITS += ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that change which kernels the libraries below torch choose, and the number
of their threads."""

_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma3",
    "f16c",
    "avx_vnni",
    "avx512_f",
    "avx512_bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
)
_SETS += (
    "avx10_1",
    "avx10_2",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "neon",
    "dotprod",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
    "sme",
)


def report() -> dict[str, Any]:
    """Describe this machine, as JSON: processor, threads, libraries, methods, and the result of
    `check_layers`.
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
        "images do not depend on the batch": check_layers(),
    }


def processor() -> dict[str, Any]:
    """The processor's name, architecture, instruction sets and caches, as far as torch or the
    system tells them.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    name = str(capabilities.get("cpu_name") or platform.processor() or "unknown")
    kind = _kind()
    sets = [key for key in _SETS if capabilities.get(key)]
    if not capabilities:
        known = {
            "avx2": "_is_avx2_supported",
            "avx512_f": "_is_avx512_supported",
            "amx_tile": "_is_amx_tile_supported",
        }
        sets = [key for key, function in known.items() if getattr(torch.cpu, function, bool)()]
    caches = {
        level: int(size)
        for level in ("l1d", "l2")
        if (size := capabilities.get(f"{level}_cache_size"))
    }
    return {
        "name": f"{name}{kind}",
        "architecture": platform.machine(),
        "instruction sets": sets,
        "caches": caches,
    }


def methods() -> dict[str, str]:
    """How the layers of a network are computed on the CPU, by dtype."""
    small = nn.Sequential(nn.Linear(8, 8))
    bfloat16 = can_prepack(nn.Sequential(nn.Linear(8, 8)).bfloat16())
    return {
        "linear and convolution, float32": batch_invariant.method(),
        "attention, float32": "torch's fused kernel"
        + (", MKL on one thread" if controlled() else ""),
        "attention of many tokens, bfloat16": "in blocks, by oneDNN"
        if bfloat16
        else "torch's fused kernel",
        "prepared networks, float32": "weights packed for oneDNN"
        if can_prepack(small)
        else "as they are",
        "prepared networks, bfloat16": "weights packed for oneDNN" if bfloat16 else "as they are",
    }


def check_layers() -> dict[str, bool]:
    """Compare images of batches with the same images alone, bit for bit, for each kind of layer.
    Takes about a second.
    """
    with torch.inference_mode():
        return {name: _same(function, x) for name, function, x in _layers()}


def _layers() -> Iterator[tuple[str, Callable[[Tensor], Tensor], Tensor]]:
    """(name, function of a batch, images), in float32 on the CPU, with numbers that do not change
    torch's random state.
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
        yield f"convolution {kernel}x{kernel} of {c} to {d} channels, stride {stride}", layer, x
        if can_prepack(layer):
            ready = prepack(nn.Sequential(layer))
            yield (
                f"prepared convolution {kernel}x{kernel} of {c} to {d} channels, stride {stride}",
                ready,
                x,
            )
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
    """True if each image of batches that begin at image 0 and at image 1 has the bits that it has
    alone.
    """
    alone = [function(x[i : i + 1].clone())[0] for i in range(len(x))]
    batches = [
        (first, function(x[first : first + size].clone())) for size in BATCHES for first in (0, 1)
    ]
    return all(
        torch.equal(image, alone[first + i]) for first, y in batches for i, image in enumerate(y)
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kind() -> str:
    """Vendor, family and model as Linux numbers them: names such as "AMD EPYC" leave them out."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ""
    entries = dict(
        line.split(":", 1)
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    parts = [
        f"{label}{entries[key]}"
        for key, label in (("vendor_id", ""), ("cpu family", "family "), ("model", "model "))
        if key in entries
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _libraries() -> dict[str, str]:
    """The versions of oneDNN and MKL that torch was built with."""
    config = torch.__config__.show()
    versions = {}
    for name, mark in (("oneDNN", "MKL-DNN v"), ("MKL", "Math Kernel Library Version ")):
        versions[name] = (
            config.split(mark)[1].split()[0].split("-")[0] if mark in config else "none"
        )
    return versions


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return ["MPS"] if torch.backends.mps.is_available() else []
