"""What the weights are: detected from the config, checked against the tensors, overridden only when asked."""
