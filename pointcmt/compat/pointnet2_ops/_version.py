"""``pointnet2_ops._version``: the release whose interface these modules have."""

__version__ = "3.0.0"
