"""``pointnet2_ops`` over :mod:`pointcmt.ops`: same names, shapes, dtypes, tie rules and gradients.

Unlike the original (erikwijmans/Pointnet2_PyTorch, ``pointnet2_ops_lib``) it also runs on a CPU,
accepts inputs that are not contiguous, and floating types other than float32.
"""

from pointcmt.compat.pointnet2_ops import _ext, pointnet2_modules, pointnet2_utils
from pointcmt.compat.pointnet2_ops._version import __version__

__all__ = ["__version__", "_ext", "pointnet2_modules", "pointnet2_utils"]
