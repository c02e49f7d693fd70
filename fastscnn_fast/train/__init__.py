"""Training and scoring: a recipe, the run that follows it, and what its weights are worth."""

from .evaluate import Confusion
from .recipe import Recipe
from .trainer import Trainer

__all__ = ["Confusion", "Recipe", "Trainer"]
