"""Recipes: YAML fragments, one per file; `lq.recipe(name)` builds their callbacks."""
