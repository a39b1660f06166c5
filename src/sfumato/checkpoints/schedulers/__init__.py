"""diffusers' scheduler_config.json <-> process, sampler and spacing.

config.py     `read_scheduler`, `write_scheduler`: a config and its `SchedulerSpec`
fields.py     the fields of diffusers' classes, their defaults and the values that they take
process.py    the fields that say what the weights were trained for
samplers.py   the fields that say how a run steps
spacing.py    the fields that say at which times a run calls the network
betas.py      tables of betas, of the original Latent Diffusion files too
"""
