"""Objectives of training, one file each: the autoencoder and the denoiser."""
