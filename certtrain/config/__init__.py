"""The YAML configuration of a run."""

from certtrain.config.loading import load_config
from certtrain.config.schema import Config

__all__ = ["Config", "load_config"]
