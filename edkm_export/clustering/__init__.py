"""Clustering of weights into small lookup tables: seeding, differentiable clustering, assignment.

    centroids, error = optimal_centroids(weight, 8)                           # exact start
    tau = scale_free_temperature(weight, 8, alpha=1.0, error=error)
    soft, centroids = soft_cluster(weight, centroids.float(), temperature=tau, iterations=5)
    indices = hard_assign(weight, centroids)

All take `[groups, m]`: one row for each set of weights that shares a lookup table.
"""

from edkm_export.clustering.assign import hard_assign
from edkm_export.clustering.marshaling import MarshaledTensors
from edkm_export.clustering.seeding import optimal_centroids
from edkm_export.clustering.soft import soft_cluster
from edkm_export.clustering.temperature import scale_free_temperature

__all__ = [
    "MarshaledTensors",
    "hard_assign",
    "optimal_centroids",
    "scale_free_temperature",
    "soft_cluster",
]
