"""What people use to register clouds: ICP, FGR and RANSAC of open3d, KISS-Matcher, small_gicp; doing nothing.

Each takes the source [N, 3] and the target [M, 3] (numpy, one unit) and a ``voxel``, the length that the
clouds are thinned to, in that unit; each returns the motion [4, 4] that takes the source to the target.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

Method = Callable[[np.ndarray, np.ndarray, float], np.ndarray]

NORMAL_RADIUS, FEATURE_RADIUS = 2.0, 5.0
"""Of normals and FPFH in voxels; open3d's tutorial on global registration."""
REACH = 1.5
"""Distance in voxels within which points correspond; open3d's tutorial."""
RANSAC_TRIALS, RANSAC_CONFIDENCE = 100_000, 0.999
"""open3d's tutorial; the confidence ends most pairs sooner."""


def need(module: str, package: str | None = None) -> Any:
    """An optional library, or an ImportError that says how to get it.

    open3d loads shared libraries of the system as it is imported; where one is missing, it ends in an OSError
    or an ImportError that names it.
    """
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError) as error:
        package = package or module
        if ".so" in str(error):
            raise ImportError(
                f"{package} is installed, and a shared library that it needs is missing ({error}); on Debian "
                "and Ubuntu: apt-get install libgl1 libgomp1 libusb-1.0-0 libx11-6"
            ) from error
        raise ImportError(
            f"this needs {package}, which the extra brings: pip install 'pointcmt[registration]' ({error})"
        ) from error
    if module == "open3d":  # what it warns of is said here, with the clouds' names
        found.utility.set_verbosity_level(found.utility.VerbosityLevel.Error)
    return found


def point_cloud(points: np.ndarray, normals: np.ndarray | None = None) -> Any:
    """An open3d cloud."""
    o3d = need("open3d")
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(np.asarray(points, dtype=np.float64)))
    if normals is not None:
        cloud.normals = o3d.utility.Vector3dVector(np.asarray(normals, dtype=np.float64))
    return cloud


def described(points: np.ndarray, voxel: float) -> tuple[Any, Any]:
    """A cloud thinned to the voxel, with normals, and its FPFH features (Rusu et al., ICRA 2009)."""
    o3d = need("open3d")
    cloud = point_cloud(points).voxel_down_sample(voxel)
    search = o3d.geometry.KDTreeSearchParamHybrid
    cloud.estimate_normals(search(NORMAL_RADIUS * voxel, 30))
    # away from the middle: normals of arbitrary sign would halve what FPFH can tell apart
    cloud.orient_normals_towards_camera_location(cloud.get_center())
    cloud.normals = o3d.utility.Vector3dVector(-np.asarray(cloud.normals))
    features = o3d.pipelines.registration.compute_fpfh_feature(cloud, search(FEATURE_RADIUS * voxel, 100))
    return cloud, features


def mutual_matches(a: Any, b: Any) -> np.ndarray:
    """Rows int64 [m, 2] of two clouds whose features are each other's nearest."""
    registration = need("open3d").pipelines.registration
    # a ratio of 0: else open3d gives all nearest ones where few are mutual
    pairs = np.asarray(registration.correspondences_from_features(a, b, True, 0.0))
    return pairs.reshape(-1, 2).astype(np.int64)


def nothing(source: np.ndarray, target: np.ndarray, voxel: float) -> np.ndarray:
    """The identity: the row that every table needs."""
    del source, target, voxel
    return np.eye(4)


def icp(
    source: np.ndarray, target: np.ndarray, voxel: float, start: np.ndarray | None = None, reach: float = 4.0
) -> np.ndarray:
    """Point-to-plane ICP of open3d from ``start`` (the identity), within ``reach`` voxels."""
    o3d = need("open3d")
    registration = o3d.pipelines.registration
    clouds = [point_cloud(points).voxel_down_sample(voxel) for points in (source, target)]
    clouds[1].estimate_normals(o3d.geometry.KDTreeSearchParamHybrid(NORMAL_RADIUS * voxel, 30))
    found = registration.registration_icp(
        clouds[0],
        clouds[1],
        reach * voxel,
        np.eye(4) if start is None else start,
        registration.TransformationEstimationPointToPlane(),
        registration.ICPConvergenceCriteria(max_iteration=50),
    )
    return np.asarray(found.transformation)


def fgr(source: np.ndarray, target: np.ndarray, voxel: float) -> np.ndarray:
    """Fast global registration on FPFH (Zhou et al., ECCV 2016; open3d)."""
    o3d = need("open3d")
    registration = o3d.pipelines.registration
    (a, fa), (b, fb) = described(source, voxel), described(target, voxel)
    o3d.utility.random.seed(0)
    found = registration.registration_fgr_based_on_feature_matching(
        a, b, fa, fb, registration.FastGlobalRegistrationOption(maximum_correspondence_distance=0.5 * voxel)
    )
    return np.asarray(found.transformation)


def ransac(source: np.ndarray, target: np.ndarray, voxel: float, seed: int = 0) -> np.ndarray:
    """RANSAC on mutual FPFH matches (open3d, with the tutorial's edge-length and distance checks)."""
    (a, fa), (b, fb) = described(source, voxel), described(target, voxel)
    return ransac_described(a, b, fa, fb, voxel, seed)


def ransac_described(a: Any, b: Any, fa: Any, fb: Any, voxel: float, seed: int = 0) -> np.ndarray:
    """As :func:`ransac`, of clouds from :func:`described`."""
    o3d = need("open3d")
    registration = o3d.pipelines.registration
    o3d.utility.random.seed(seed)
    found = registration.registration_ransac_based_on_feature_matching(
        a,
        b,
        fa,
        fb,
        True,
        REACH * voxel,
        registration.TransformationEstimationPointToPoint(False),
        3,
        [
            registration.CorrespondenceCheckerBasedOnEdgeLength(0.9),
            registration.CorrespondenceCheckerBasedOnDistance(REACH * voxel),
        ],
        registration.RANSACConvergenceCriteria(RANSAC_TRIALS, RANSAC_CONFIDENCE),
    )
    return np.asarray(found.transformation)


def kiss(source: np.ndarray, target: np.ndarray, voxel: float) -> np.ndarray:
    """KISS-Matcher (Lim et al., 2024), in its own default resolution: it refuses small voxels."""
    library = need("kiss_matcher", "kiss-matcher")
    config = library.KISSMatcherConfig()
    scale = config.voxel_size / voxel
    found = library.KISSMatcher(config).estimate(
        *(np.asarray(points * scale, dtype=np.float32) for points in (source, target))
    )
    motion = np.eye(4)
    motion[:3, :3] = np.asarray(found.rotation)
    motion[:3, 3] = np.asarray(found.translation).reshape(3) / scale
    return motion


def gicp(source: np.ndarray, target: np.ndarray, voxel: float, start: np.ndarray | None = None) -> np.ndarray:
    """Generalised ICP of small_gicp (Koide, JOSS 2024), from ``start`` (the identity)."""
    library = need("small_gicp", "small_gicp")
    found = library.align(
        np.asarray(target, dtype=np.float64),
        np.asarray(source, dtype=np.float64),
        np.eye(4) if start is None else start,
        "GICP",
        downsampling_resolution=voxel,
        max_correspondence_distance=4 * voxel,
    )
    return np.asarray(found.T_target_source)


BASELINES: dict[str, Method] = {
    "nothing": nothing,
    "icp": icp,
    "fgr": fgr,
    "ransac": ransac,
    "kiss": kiss,
    "gicp": gicp,
}


def run_baseline(name: str, source: np.ndarray, target: np.ndarray, voxel: float) -> np.ndarray:
    """The motion [4, 4] that a baseline finds; the identity where it says nothing sensible.

    Raises:
        ValueError: an unknown name.
        ImportError: its library is not installed.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r}: expected one of {', '.join(BASELINES)}")
    motion = BASELINES[name](source, target, voxel)
    proper = np.isfinite(motion).all() and np.allclose(
        motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-3
    )
    return motion if proper else np.eye(4)
