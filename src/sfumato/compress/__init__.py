"""Act 1, compress: image (B, 3, H, W) -> latent z (B, C, h, w). Encoders and decoders.

    autoencoder = AutoencoderKL(KLConfig(latent_channels=4))
    z = autoencoder.encode(image)
    image = autoencoder.decode(z)

The names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.compress.base import Autoencoder, Posterior, SequentialAutoencoder
    from sfumato.compress.kl import AutoencoderKL, KLConfig
    from sfumato.compress.kl_flux2 import AutoencoderKLFlux2, KLFlux2Config
    from sfumato.compress.tiny import AutoencoderTiny, TinyConfig
    from sfumato.compress.vq import VQConfig, VQModel

__all__ = [
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderTiny",
    "KLConfig",
    "KLFlux2Config",
    "Posterior",
    "SequentialAutoencoder",
    "TinyConfig",
    "VQConfig",
    "VQModel",
]
_HOMES = dict.fromkeys(__all__, "base")
_HOMES |= {"AutoencoderKL": "kl", "KLConfig": "kl"}
_HOMES |= {"AutoencoderKLFlux2": "kl_flux2", "KLFlux2Config": "kl_flux2"}
_HOMES |= {"AutoencoderTiny": "tiny", "TinyConfig": "tiny", "VQConfig": "vq", "VQModel": "vq"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sfumato.compress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sfumato.compress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
