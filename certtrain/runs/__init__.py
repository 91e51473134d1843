"""From a configuration to a directory that holds a trained, verified network."""
