"""Rewrites before planning: the kernels know no batch norm, so it goes into the weights before it."""

from qcore.fx.fuse import BATCH_NORM_FUSIONS

FUSION_PATTERNS = BATCH_NORM_FUSIONS
