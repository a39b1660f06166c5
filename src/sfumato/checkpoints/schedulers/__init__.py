"""diffusers' scheduler_config.json <-> process, sampler and spacing.

config.py     `read_scheduler`, `write_scheduler`: a config and its `SchedulerSpec`
fields.py     fields of diffusers' classes, their defaults and the values that they take
process.py    fields of the process that the weights were trained for
samplers.py   fields of the sampler, the steps of a run
spacing.py    fields of the spacing, the times of a run
betas.py      tables of betas, of the original Latent Diffusion files too
"""
