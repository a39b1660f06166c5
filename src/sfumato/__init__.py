"""sfumato: the whole life of a latent diffusion model in one small library.

    import sfumato
    model = sfumato.load("fashion")
    images = model.generate("ankle boot", n=4, steps=20, guidance=2.0, seed=7)

The names below are imported when they are first used, so that `import sfumato` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.loading import load
    from sfumato.model import LatentDiffusion
    from sfumato.sampling import Request

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "Request", "__version__", "load"]
_HOMES = {"load": "loading", "LatentDiffusion": "model", "Request": "sampling"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sfumato.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
