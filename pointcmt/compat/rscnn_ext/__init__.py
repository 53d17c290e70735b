"""The package ``_ext`` that Relation-Shape CNN built over ``torch.utils.ffi``; it holds ``pointnet2``."""

from pointcmt.compat.rscnn_ext import pointnet2

__all__ = ["pointnet2"]
