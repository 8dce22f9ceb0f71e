"""Tensor parallelism over torch.distributed."""
