"""Training: one loop, pluggable objectives, exact resume.

    recipe = load_recipe("fashion_mnist", "denoiser")
    folder = recipe.run(Path("runs/mine"))

A recipe (train/recipes/*.py) is Python that builds its settings. The names below are imported when
they are first used.
"""

from typing import TYPE_CHECKING

from sfumato.registry import lazy_exports

if TYPE_CHECKING:
    from sfumato.train.conditions.captions import Captions, open_text_conditioner
    from sfumato.train.loop import LoopSettings, train
    from sfumato.train.objective import Draw, Objective
    from sfumato.train.objectives.autoencoder import AutoencoderLoss, AutoencoderObjective
    from sfumato.train.objectives.denoiser import DenoiserLoss, DenoiserObjective
    from sfumato.train.parts import export_model
    from sfumato.train.recipe import (
        AutoencoderRecipe,
        DataSettings,
        DenoiserRecipe,
        encode_all,
    )
    from sfumato.train.recipe_file import load_recipe, run_recipe
    from sfumato.train.timestep_search import Tuned, store_tuned, tune_timesteps, with_tuned

__all__ = [
    "AutoencoderLoss",
    "AutoencoderObjective",
    "AutoencoderRecipe",
    "Captions",
    "DataSettings",
    "DenoiserLoss",
    "DenoiserObjective",
    "DenoiserRecipe",
    "Draw",
    "LoopSettings",
    "Objective",
    "Tuned",
    "encode_all",
    "export_model",
    "load_recipe",
    "open_text_conditioner",
    "run_recipe",
    "store_tuned",
    "train",
    "tune_timesteps",
    "with_tuned",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "conditions.captions": ("Captions", "open_text_conditioner"),
        "loop": ("LoopSettings", "train"),
        "objective": ("Draw", "Objective"),
        "objectives.autoencoder": ("AutoencoderLoss", "AutoencoderObjective"),
        "objectives.denoiser": ("DenoiserLoss", "DenoiserObjective"),
        "parts": ("export_model",),
        "recipe": (*("AutoencoderRecipe", "DataSettings", "DenoiserRecipe", "encode_all"),),
        "recipe_file": ("load_recipe", "run_recipe"),
        "timestep_search": ("Tuned", "store_tuned", "tune_timesteps", "with_tuned"),
    },
)
