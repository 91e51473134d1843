"""Sets that flow through a network."""

from certtrain.bounds.box import Box, linf_box
from certtrain.bounds.interval import Bounds
from certtrain.bounds.model import BoundedModel

__all__ = ["BoundedModel", "Bounds", "Box", "linf_box"]
