"""Act 2, diffuse: z <-> noise. Schedules, parameterizations, the process, timesteps and samplers;
no network in here.
"""
