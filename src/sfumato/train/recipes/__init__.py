"""Recipes, one a file: `sfumato train STAGE NAME` finds them by their names."""
