"""From files to a model: which tensors there are, where each one goes, and a report of what was decided."""
