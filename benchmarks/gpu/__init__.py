"""What a person with one NVIDIA card measures: ``python -m benchmarks.gpu``."""
