"""What a training step minimises, and the loop that takes steps."""
