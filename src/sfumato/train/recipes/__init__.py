"""Recipes of the published results, one a file: `sfumato train STAGE NAME` finds them by name."""
