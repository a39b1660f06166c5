"""Training: one loop, pluggable objectives, exact resume. A recipe (recipes/*.py) is Python that
builds its settings.
"""

from sfumato.train.recipe import AutoencoderRecipe, DenoiserRecipe, load_recipe, run_recipe

__all__ = ["AutoencoderRecipe", "DenoiserRecipe", "load_recipe", "run_recipe"]
