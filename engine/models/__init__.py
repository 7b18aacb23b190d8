"""The model families, one file each: see docs/adding-a-model.md.

No torch but in `build` and `causal_lm`, so that a configuration can be read without it.
"""
