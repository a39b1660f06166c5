"""Guidance: wrappers around a denoiser, one file each, found by name."""
