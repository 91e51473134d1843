"""Sets that flow through a network."""

from certtrain.bounds.backends import Bounder, bounded_model
from certtrain.bounds.box import Box, linf_box
from certtrain.bounds.extending import register_operation
from certtrain.bounds.linear.relaxations import LinearRelaxation
from certtrain.bounds.margins import proved
from certtrain.bounds.model import BoundedModel
from certtrain.bounds.operations.record import Concave, Convex, PiecewiseLinear, Smooth, SShaped
from certtrain.bounds.results import Bounds

__all__ = [
    "BoundedModel",
    "Bounder",
    "Bounds",
    "Box",
    "Concave",
    "Convex",
    "LinearRelaxation",
    "PiecewiseLinear",
    "SShaped",
    "Smooth",
    "bounded_model",
    "linf_box",
    "proved",
    "register_operation",
]
