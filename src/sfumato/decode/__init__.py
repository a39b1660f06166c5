"""Act 4, decode: z -> image. Ways to run a decoder, and a preview without one.

    whole(autoencoder, z)      all at once, a few images at a time
    exact(autoencoder, z)      in strips: the same result, in a fraction of the memory
    tiled(autoencoder, z)      in overlapping tiles: memory grows with the tile
    Preview.fit(z, image)      a linear map from latents to small images

`exact_posterior` and `tiled_posterior` encode in the same ways. `decode_in_range` and
`encode_in_range` try again in float32 where half precision overflows.
"""

from sfumato.decode.exact import exact, exact_posterior
from sfumato.decode.overflow import decode_in_range, encode_in_range
from sfumato.decode.preview import Preview
from sfumato.decode.tiled import tiled, tiled_posterior
from sfumato.decode.whole import whole

__all__ = [
    "Preview",
    "decode_in_range",
    "encode_in_range",
    "exact",
    "exact_posterior",
    "tiled",
    "tiled_posterior",
    "whole",
]
