"""Data: images from IDX files, folders, tables and the Hub, and caches of their latents.

    open_images("fashion-mnist") -> ImageSet -> cache_latents(images, encode, ...) -> LatentSet
    open_buckets("images", side=256, step=32) -> BucketedImages, an ImageSet a bucket

The sets return `batch(indices)`. The indices (shuffling, held-out images, resume) are drawn by the
training loop.
"""

from sfumato.data.buckets import (
    BucketedImages,
    BucketedLatents,
    bucket_sizes,
    nearest_bucket,
    open_buckets,
)
from sfumato.data.images import ImageSet
from sfumato.data.latent_cache import LatentSet, cache_latents
from sfumato.data.reading import Reading
from sfumato.data.source import open_images
from sfumato.data.splits import Division, Split, open_both, open_split
from sfumato.data.transform import Transform

__all__ = [
    "BucketedImages",
    "BucketedLatents",
    "Division",
    "ImageSet",
    "LatentSet",
    "Reading",
    "Split",
    "Transform",
    "bucket_sizes",
    "cache_latents",
    "nearest_bucket",
    "open_both",
    "open_buckets",
    "open_images",
    "open_split",
]
