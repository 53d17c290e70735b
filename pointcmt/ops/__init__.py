"""Point-cloud operators: compiled kernels where they were built, PyTorch twins everywhere else."""

from pointcmt.ops._deferred import check_deferred
from pointcmt.ops.edges import norm_act_max
from pointcmt.ops.emd import EmdStatistics, emd, emd_statistics
from pointcmt.ops.grouping import (
    gather_points,
    group_points,
    group_relative,
    query_and_group,
    three_interpolate,
)
from pointcmt.ops.neighbors import ball_query, knn, three_nn
from pointcmt.ops.normalize import unit_cube
from pointcmt.ops.rigid import Rigid, weighted_procrustes
from pointcmt.ops.sampling import furthest_point_sample, voxel_subsample

__all__ = [
    "EmdStatistics",
    "Rigid",
    "ball_query",
    "check_deferred",
    "emd",
    "emd_statistics",
    "furthest_point_sample",
    "gather_points",
    "group_points",
    "group_relative",
    "knn",
    "norm_act_max",
    "query_and_group",
    "three_interpolate",
    "three_nn",
    "unit_cube",
    "voxel_subsample",
    "weighted_procrustes",
]
