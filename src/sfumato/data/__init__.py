"""Data: pictures from IDX files, folders, parquet and Hugging Face datasets, and the cache of their latents.

    open_images("fashion-mnist") -> ImageSet -> cache_latents(images, encode, ...) -> LatentSet

Both sets answer `batch(indices)`; who draws the indices (shuffling, holdout, resume) is the training loop's business.
"""

from sfumato.data.images import ImageSet
from sfumato.data.latent_cache import LatentSet, cache_latents
from sfumato.data.source import open_images
from sfumato.data.transform import Transform

__all__ = ["ImageSet", "LatentSet", "Transform", "cache_latents", "open_images"]
