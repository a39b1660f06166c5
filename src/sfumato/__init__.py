"""sfumato: the whole life of a latent diffusion model in one small library.

    import sfumato
    model = sfumato.load("fashion")
    images = model.generate("ankle boot", n=4, steps=20, guidance=2.0, seed=7)

The names below are imported when they are first used, so that `import sfumato` costs nothing.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato import tasks
    from sfumato.errors import NumericalError, UserError
    from sfumato.loading import load
    from sfumato.model import LatentDiffusion
    from sfumato.predict.guidance.settings import Guidance
    from sfumato.sampling import Defaults, Plan, Request

__version__ = "0.1.0"
__all__ = [
    "Defaults",
    "Guidance",
    "LatentDiffusion",
    "NumericalError",
    "Plan",
    "Request",
    "UserError",
    "__version__",
    "load",
    "tasks",
]
_HOMES = {
    "Defaults": "sampling.request",
    "Guidance": "predict.guidance.settings",
    "LatentDiffusion": "model",
    "NumericalError": "errors",
    "Plan": "sampling.plan",
    "Request": "sampling.request",
    "UserError": "errors",
    "load": "loading",
}

# GNU's OpenMP, which torch's threads are, reads these when torch is loaded. By default a thread
# that waits for the others spins for milliseconds, and beside a busy process it spins while the
# thread that it waits for has no processor. Spinning for about 50 microseconds bridges the gap
# between two layers just as well.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return importlib.import_module("sfumato.tasks")
    if name in _HOMES:
        return getattr(importlib.import_module(f"sfumato.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
