"""sfumato: the whole life of a latent diffusion model in one small library.

    import sfumato
    model = sfumato.load("fashion")
    images = model.generate("ankle boot", n=4, steps=20, guidance=2.0, seed=7)

The names below are imported when they are first used, so that `import sfumato` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.model import LatentDiffusion, load

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "LatentDiffusion"):
        from sfumato import model

        return getattr(model, name)
    raise AttributeError(f"module 'sfumato' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
