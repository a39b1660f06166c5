"""Networks: (x, timestep, conditioning) -> y. The denoiser turns y into a `Prediction`."""
