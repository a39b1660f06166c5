"""From a request to latents, in three files.

request.py   `Request` and `Defaults`: data, and the checks that need no model
plan.py      `resolve`: a request and a model -> `Plan`; every `UserError` of a request is raised
             here
run.py       `plan_coroutine`: a `Plan` as a coroutine of denoiser calls that returns the latents
"""

from sfumato.diffuse.seeds import random_seed
from sfumato.sampling.plan import Plan, Settings, resolve, resolve_settings
from sfumato.sampling.request import Defaults, Model, Request, sampler_of, spacing_of
from sfumato.sampling.run import plan_coroutine

__all__ = ["Defaults", "Model", "Plan", "Request", "Settings", "plan_coroutine", "resolve"]
__all__ += ["random_seed", "resolve_settings", "sampler_of", "spacing_of"]
