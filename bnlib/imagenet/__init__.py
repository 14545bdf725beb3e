"""The paper's ImageNet experiments (section 4.2): recipes, data, training, evaluation."""

from bnlib.imagenet.recipes import ENSEMBLE, RECIPES, Recipe, recipe

__all__ = ["ENSEMBLE", "RECIPES", "Recipe", "recipe"]
