"""The load-generation client: timed left of the run file, pure arithmetic right of it."""

__version__ = "0.1.0"
