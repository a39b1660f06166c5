"""PatchGAN discriminator and its losses.

Isola et al. 2017, arXiv:1611.07004, section 3.2.2.

Hinge: L_D = 0.5 E[relu(1 - D(real))] + 0.5 E[relu(1 + D(fake))], L_G = -E[D(fake)] (Lim & Ye 2017,
arXiv:1705.02894). Adaptive weight: |grad L_rec| / (|grad L_G| + 1e-4) at the decoder's last layer
(Esser et al. 2021, arXiv:2012.09841, eq. 7).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """image (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w), one a patch.

    Group norm instead of batch norm: real and fake need no common batch.

    Args:
        channels: Of the images.
        width: Channels of the first layer.
        layers: Number of times the side is halved: 3 is the 70x70 PatchGAN, 2 suits images of 32
            pixels.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3):
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for i in range(1, layers + 1):
            inside, outside = width * min(2 ** (i - 1), 8), width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(inside, outside, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, outside),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(width * min(2**layers, 8), 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 h w"]:
        """Return a logit for each patch."""
        return self.main(image)


def hinge(real: Float[Tensor, "..."], fake: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The discriminator's loss from logits of real and reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The weight of the adversarial loss that balances the reconstruction loss.

    With several processes the gradients are those of the whole batch, so that every process weighs
    alike.

    Args:
        reconstruction: The reconstruction loss.
        adversarial: The generator's loss.
        last_layer: The weight at which their gradients are compared.

    Returns:
        The quotient of the gradients' norms, at most 1e4, without gradient.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
        for loss in (reconstruction, adversarial)
    ]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
    a, b = (gradient.norm() for gradient in gradients)
    return (a / (b + 1e-4)).clamp(0, 1e4).detach()
