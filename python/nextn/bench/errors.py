"""The failure a user of the benchmark can act on."""


class BenchError(Exception):
    """The run cannot start or finish; the message says what to do."""
