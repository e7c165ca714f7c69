"""MeanSparse for any vision classifier in a Lightning ``Trainer``, measured honestly.

The names below are the public interface; everything else may change between two releases.
"""

__version__ = "0.1.0"

__all__: list[str] = []
