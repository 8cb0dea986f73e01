"""Training runs: from a configuration to what people read about its result."""
