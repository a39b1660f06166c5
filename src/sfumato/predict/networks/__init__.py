"""Networks: (x, timestep, conditioning) -> y. They know no schedule; the denoiser gives y its
meaning.
"""
