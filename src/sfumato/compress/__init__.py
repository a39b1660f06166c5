"""Act 1, compress: image (B, 3, H, W) -> latent z (B, C, h, w). Both halves of every autoencoder
live here.
"""
