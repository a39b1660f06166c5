"""Training of a KL autoencoder: reconstruction + perceptual + KL + adversarial loss.

    loss = |x - x^| (or squared), mean over pixels
         + w_p * perceptual + w_kl * KL / pixels + lambda * w_g * L_G

Rombach et al. 2022, arXiv:2112.10752, appendix G, eq. 25. The KL in nats is divided by the number
of pixel values, so that weights such as 1e-6 mean what they mean in Latent Diffusion, whose losses
are sums over the image.
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image as PIL
from torch import Tensor, nn

from sfumato.compress.base import Autoencoder, Posterior
from sfumato.compress.kl import AutoencoderKL
from sfumato.data import ImageSet
from sfumato.errors import UserError
from sfumato.evaluate.features import Features
from sfumato.evaluate.frechet import frechet_distance, gaussian
from sfumato.evaluate.reconstruction import PIXELS, WINDOW, decibels, mse_by_image, ssim
from sfumato.images import grid, to_pil
from sfumato.io.progress import report
from sfumato.train.discriminator import PatchDiscriminator, adaptive_weight, hinge
from sfumato.train.objective import Draw, Objective, Preview
from sfumato.train.perceptual import feature_maps, perceptual_distance
from sfumato.train.settings import check_fields
from sfumato.validate import number_in, one_of, whole_number

HELD_OUT = 2000
"""Most held-out images that a preview measures."""


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the terms. A weight of 0 leaves a term and its network out."""

    pixel: Literal["l1", "l2"] = "l1"
    kl: float = 1e-6
    perceptual: float = 0.0
    perceptual_network: str = "efficientnet-lite0"
    adversarial: float = 0.0
    adversarial_start: int = 0
    """The first step of the discriminator and of the adversarial term."""
    discriminator_width: int = 64
    discriminator_layers: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("pixel loss", self.pixel, ("l1", "l2"))
        whole_number("adversarial_start", self.adversarial_start, 0)
        whole_number("discriminator_layers", self.discriminator_layers, 0, 16)
        width = self.discriminator_width
        if width % 4 or not 4 <= width <= 2**16:  # groups of its normalisation
            raise UserError(f"discriminator_width={width}: expected a multiple of 4, at least 4")
        for name in ("kl", "perceptual", "adversarial"):
            number_in(f"loss weight {name}", getattr(self, name), 0, hint="0 leaves the term out")


class AutoencoderObjective(Objective):
    """Training of an autoencoder and, with an adversarial weight, of a discriminator.

    Args:
        autoencoder: The network to train.
        images: The training images.
        held_out: Images of the previews.
        loss: Weights of the terms.
        features: The feature network of the held-out Frechet distance; None: not measured.
        pairs: Number of held-out images that a preview shows with their reconstructions.
    """

    main = "autoencoder"
    stage = "train autoencoder"

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        images: ImageSet,
        held_out: ImageSet,
        loss: AutoencoderLoss,
        features: Features | None = None,
        pairs: int = 16,
    ):
        self.pairs = pairs
        self.images, self.held_out = images.unflipped(), held_out
        self.weights, self.features, self.autoencoder = loss, features, autoencoder
        # mirrored here and not by the data, so that a resumed run mirrors the same images
        self.flip = images.transform.flip
        self.networks: dict[str, nn.Module] = {"autoencoder": autoencoder}
        if loss.adversarial:
            self.networks["discriminator"] = PatchDiscriminator(
                autoencoder.channels, loss.discriminator_width, loss.discriminator_layers
            )
        self.maps = feature_maps(loss.perceptual_network) if loss.perceptual else None
        self.fake: Tensor | None = None  # this step's reconstructions, for the discriminator's turn

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON of the network, the loss and the images."""
        data = {"pixels": self.images.fingerprint, "transform": self.images.transform.hash}
        return {
            "network": self.autoencoder.to_config(),
            "loss": asdict(self.weights),
            "data": {**data, "flip": self.flip},
        }

    def batch(self, indices: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Images and labels, mirrored by `draw` where the data are mirrored."""
        batch = self.images.batch(indices)
        if self.flip:
            mirrored = draw(lambda n, generator: torch.rand(n, generator=generator) < 0.5)
            batch["image"][mirrored] = batch["image"][mirrored].flip(-1)
        return batch

    def active(self, phase: str, step: int) -> bool:
        """True for the autoencoder, and for the discriminator from its first step."""
        return phase == "autoencoder" or step >= self.weights.adversarial_start

    def loss(
        self,
        phase: str,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Tensor],
        step: int,
        draw: Draw,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of the module's docstring, or the discriminator's hinge loss."""
        image = batch["image"]
        if phase == "discriminator":
            assert self.fake is not None
            both = torch.cat([image, self.fake])
            real, fake = networks["discriminator"](both).float().chunk(2)
            self.fake = None
            numbers = {"real": real.detach().mean(), "fake": fake.detach().mean()}
            return hinge(real, fake), {f"discriminator/{k}": v for k, v in numbers.items()}

        w = self.weights
        space = self.autoencoder.space
        shape = (space.channels, image.shape[2] // space.factor, image.shape[3] // space.factor)
        noise = draw(lambda n, generator: torch.randn(n, *shape, generator=generator))
        noise = noise.to(image.device)
        rebuilt, mean, std = (v.float() for v in networks["autoencoder"](image, noise))
        pixel = F.l1_loss(rebuilt, image) if w.pixel == "l1" else F.mse_loss(rebuilt, image)
        kl = Posterior(mean, std).kl().mean()
        numbers: dict[str, float | Tensor]
        numbers = {"autoencoder/pixel": pixel.detach(), "autoencoder/kl": kl.detach()}
        total = pixel
        if self.maps is not None:
            perceptual = perceptual_distance(self.maps, rebuilt, image).mean()
            numbers["autoencoder/perceptual"] = perceptual.detach()
            total = total + w.perceptual * perceptual
        if w.adversarial and step >= w.adversarial_start:
            discriminator = self.networks["discriminator"].requires_grad_(False)
            fooled = -discriminator(rebuilt).float().mean()
            scale = adaptive_weight(total, fooled, self.autoencoder.decoder.conv_out.weight)
            discriminator.requires_grad_(True)
            numbers["autoencoder/adversarial"] = fooled.detach()
            numbers["autoencoder/adaptive_weight"] = scale
            total = total + w.adversarial * scale * fooled
            self.fake = rebuilt.detach()
        return total + w.kl * kl / image[0].numel(), numbers

    @torch.no_grad()
    def show(self, network: nn.Module, step: int) -> Preview:
        """PSNR, SSIM and the Frechet distance on held-out images, and pairs (original above).

        Images go through the autoencoder in batches of about `PIXELS` pixels.
        """
        assert isinstance(network, Autoencoder)
        count = min(HELD_OUT, len(self.held_out))
        chosen = random.Random(0).sample(range(len(self.held_out)), count)
        height, width = self.held_out.shape[1:]
        batch = max(1, PIXELS // (height * width))
        device = next(network.parameters()).device
        errors, windows, shown = [], 0.0, [[], []]
        features: list[tuple[Tensor, Tensor]] = []
        for start in range(0, count, batch):
            image = self.held_out.batch(chosen[start : start + batch])["image"]
            rebuilt = network.decode(network.encode(image.to(device))).cpu().clamp(-1, 1)
            a, b = (image + 1) / 2, (rebuilt + 1) / 2
            errors.append(mse_by_image(a, b))
            if min(height, width) >= WINDOW:
                windows += ssim(a, b) * len(a)
            if self.features is not None:
                features.append((self.features(a), self.features(b)))
            missing = self.pairs - len(shown[0])
            for images, part in zip(shown, (image, rebuilt), strict=True):
                images += to_pil(part[:missing]) if missing > 0 else []
            report("held-out images", min(start + batch, count), count)
        numbers = {"held_out/psnr": decibels(float(torch.cat(errors).mean()))}
        if min(height, width) >= WINDOW:
            numbers["held_out/ssim"] = windows / count
        if features and count > 1:
            real, fake = (torch.cat(parts) for parts in zip(*features, strict=True))
            numbers["held_out/frechet"] = frechet_distance(gaussian(real), gaussian(fake))
        return numbers, {"reconstructions": _pairs(shown[0], shown[1])}


def _pairs(originals: list[PIL.Image], rebuilt: list[PIL.Image], columns: int = 8) -> PIL.Image:
    """A grid in which each original stands above its reconstruction."""
    columns = min(columns, len(originals))
    blank = PIL.new(originals[0].mode, originals[0].size, "white")
    images: list[PIL.Image] = []
    for start in range(0, len(originals), columns):
        for row in (originals[start : start + columns], rebuilt[start : start + columns]):
            images += row + [blank] * (columns - len(row))
    return grid(images, columns=columns)
