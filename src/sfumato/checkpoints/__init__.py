"""Models on disk: diffusers folders in, diffusers folders out. `names/` holds two-way tables of
other layouts.
"""
