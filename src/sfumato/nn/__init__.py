"""Layers: attention, residual blocks, embeddings, MMDiT, modulation, RoPE."""
