"""Image to image: a run begins with an image, noised to its first time.

SDEdit (Meng et al. 2022, arXiv:2108.01073, algorithm 1).

With little strength colours and shapes stay, with much only the composition: style transfer,
variations, repairs.
"""

from sfumato.errors import UserError
from sfumato.model import LatentDiffusion
from sfumato.sampling.plan import Plan
from sfumato.sampling.request import Request
from sfumato.tasks._images import (
    ImageInput,
    NoiseDraws,
    check_posterior,
    encode_images,
    extra_channels,
    last_steps,
    resize_request,
)


def image_to_image(
    model: LatentDiffusion,
    image: ImageInput,
    request: Request | None = None,
    *,
    strength: float = 0.8,
    posterior: str = "mean",
) -> Plan:
    """Plan images that begin with an image.

    Args:
        model: any that takes the latent alone
        image: one for all images or one an image; the result has its size
        request: everything else
        strength: in (0, 1]: the share of the steps that are run
        posterior: "mean": begin with the mean of the autoencoder's posterior; "sample": with a draw
            from it (diffusers' way), made before the run's noise

    Raises:
        UserError: for a size, strength or network that does not fit
    """
    pixels, request = resize_request(model, image, request or Request())
    if extra_channels(model):
        raise UserError(
            f"this model takes {extra_channels(model)} channels beside the latent: use the task that it was trained for"
        )
    check_posterior(posterior)
    plan = model.plan(request)
    times = last_steps(plan.timesteps, strength)
    draws = NoiseDraws(model, plan)
    z = encode_images(model, pixels, posterior, draws)
    return plan.edit(timesteps=times, init_latent=z, noise_offset=draws.used)
