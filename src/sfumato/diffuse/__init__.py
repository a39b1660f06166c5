"""Act 2, diffuse: z <-> noise.

Schedules, parameterizations, the process, spacings of timesteps and samplers. No network is in
here.
"""

from sfumato.diffuse.parameterization import PARAMETERIZATIONS, Parameterization, edm
from sfumato.diffuse.parameterization import parameterization as get_parameterization
from sfumato.diffuse.process import Process
from sfumato.diffuse.run import SeededNoise, Step, iterate_steps, run_sampler, sampler_coroutine
from sfumato.diffuse.samplers import Traits, calls, draws, get_sampler, traits_of
from sfumato.diffuse.schedule import (
    EDM,
    SCHEDULES,
    BetaTable,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    VariancePreserving,
)
from sfumato.diffuse.schedule import schedule as get_schedule
from sfumato.diffuse.schedule_transforms import (
    Shifted,
    ZeroTerminalSNR,
    dynamic_shift,
    flux2_shift,
    shifted_time,
)
from sfumato.diffuse.slerp import SlerpNoise
from sfumato.diffuse.timesteps import SPACINGS, check_times, resample, truncate
from sfumato.diffuse.timesteps import timesteps as get_timesteps
from sfumato.diffuse.weighting import draw_times, loss_weight

__all__ = ["EDM", "SCHEDULES", "BetaTable", "RectifiedFlow", "Schedule", "Shifted"]
__all__ += ["VarianceExploding", "VariancePreserving", "ZeroTerminalSNR", "dynamic_shift"]
__all__ += ["flux2_shift", "get_schedule", "shifted_time"]
__all__ += ["PARAMETERIZATIONS", "Parameterization", "Process", "draw_times", "edm"]
__all__ += ["get_parameterization", "loss_weight"]
__all__ += ["SPACINGS", "check_times", "get_timesteps", "resample", "truncate"]
__all__ += ["SeededNoise", "SlerpNoise", "Step", "Traits", "calls", "draws", "get_sampler"]
__all__ += ["iterate_steps", "run_sampler", "sampler_coroutine", "traits_of"]
