"""Sets that flow through a network."""

from certtrain.bounds.box import Box, linf_box
from certtrain.bounds.graph import BoundedModel
from certtrain.bounds.interval import Bounds

__all__ = ["BoundedModel", "Bounds", "Box", "linf_box"]
