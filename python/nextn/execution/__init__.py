"""The engine: a scheduler and a speculative cycle over KV tensors, in process or behind a socket."""
