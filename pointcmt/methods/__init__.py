"""One preset per file: which objectives, which heads, which views. The mechanism is ``pointcmt.training``."""

from pointcmt.methods.pointcmt import PointCMT

__all__ = ["PointCMT"]
