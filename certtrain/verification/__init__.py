"""What is proved of a trained network, and proofs that others can check."""
