"""Print a hash of the kernels below torch.

Two processes with the same hash use the same kernels.

python tests/helpers/fingerprint.py [other_vendor]
"""

import hashlib
import importlib
import sys

import torch
import torch.nn.functional as F


def fingerprint() -> str:
    """Return a hash of the bits of products, convolutions, attention and elementwise functions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    results = [
        F.linear(normal(rows, n), normal(m, n))
        for rows in (1, 3, 5, 9)
        for n, m in ((64, 256), (320, 96), (1280, 320))
    ]
    results += [F.conv2d(normal(2, c, 9, 9), normal(16, c, 3, 3)) for c in (3, 64, 640)]
    results += [f(normal(33, 7, 5)) for f in (F.silu, F.gelu, torch.exp, torch.tanh)]
    results += [
        F.layer_norm(normal(5, 77), (77,)),
        F.group_norm(normal(2, 8, 7, 7), 4),
        normal(9, 130).softmax(-1),
    ]
    results += [
        F.scaled_dot_product_attention(*(normal(2, 3, length, 40) for length in (50, 77, 77)))
    ]
    if torch.backends.mkldnn.is_available():
        results += [
            torch.mkldnn_convolution(
                normal(2, 8, 7, 7), normal(8, 8, 3, 3), None, [1, 1], [1, 1], [1, 1], 1
            )
        ]
    return hashlib.sha256(b"".join(result.numpy().tobytes() for result in results)).hexdigest()[:16]


if __name__ == "__main__":
    for plugin in sys.argv[1:]:
        importlib.import_module(plugin)
    torch.set_grad_enabled(False)
    print(fingerprint())
