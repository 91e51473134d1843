"""Backward linear relaxations: CROWN-IBP, CROWN, alpha-CROWN, and the fused cross-entropy."""

from certtrain.bounds.linear.alpha import AlphaOptions, alpha_margins
from certtrain.bounds.linear.backward import lower_bounds
from certtrain.bounds.linear.crown import Tightening, crown_margins, tightened
from certtrain.bounds.linear.fusion import fused_cross_entropy

__all__ = [
    "AlphaOptions",
    "Tightening",
    "alpha_margins",
    "crown_margins",
    "fused_cross_entropy",
    "lower_bounds",
    "tightened",
]
