"""Scaling laws: which width, for how long, for a given amount of compute."""
