"""Cross-modal training as a plugin: images teach the point-cloud network you already have."""

from pointcmt._version import __version__

__all__ = ["__version__"]
