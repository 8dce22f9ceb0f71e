"""Which sequences run in the next step, and which KV pages are theirs. Plain Python: no tensors here."""
