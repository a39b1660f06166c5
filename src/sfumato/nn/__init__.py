"""Layers that know nothing of diffusion: attention, residual blocks, embeddings."""
