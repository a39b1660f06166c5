"""Act 1, compress: image (B, 3, H, W) -> latent z (B, C, h, w). Encoders and decoders.

    autoencoder = AutoencoderKL(KLConfig(latent_channels=4))
    z = autoencoder.encode(image)
    image = autoencoder.decode(z)

The names below are imported when they are first used.
"""

from typing import TYPE_CHECKING

from sfumato.registry import lazy_exports

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
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "base": ("Autoencoder", "Posterior", "SequentialAutoencoder"),
        "kl": ("AutoencoderKL", "KLConfig"),
        "kl_flux2": ("AutoencoderKLFlux2", "KLFlux2Config"),
        "tiny": ("AutoencoderTiny", "TinyConfig"),
        "vq": ("VQConfig", "VQModel"),
    },
)
