"""Act 2, diffuse: z <-> noise.

Schedules, parameterizations, the process, spacings of timesteps and samplers. No network is in
here.
"""
