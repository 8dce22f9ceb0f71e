"""The serving benchmark: a client that imports nothing of the engine and works against any OpenAI-compatible server."""
