"""The parts that decoder models are built from."""
