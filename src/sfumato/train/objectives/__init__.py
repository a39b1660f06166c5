"""What can be trained, one file each: the autoencoder and the denoiser."""
