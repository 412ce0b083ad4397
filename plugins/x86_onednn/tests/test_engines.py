"""Which engine computes what, by weights and shapes."""

import pytest
import torch
from qcore_x86_onednn.engines import engine_of_conv

PLAIN, STRIDED, PADDED = ([1, 1], [0, 0], [1, 1]), ([2, 2], [0, 0], [1, 1]), ([1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize(
    ("weight", "geometry", "groups", "shape", "without_vnni", "with_vnni"),
    [
        ((96, 24, 1, 1), PLAIN, 1, (1, 24, 1, 1), "fbgemm", "fbgemm"),  # Squeeze and excitation.
        ((64, 384, 1, 1), PLAIN, 1, (1, 384, 14, 14), "onednn", "fbgemm"),  # 12,544 results.
        ((384, 64, 1, 1), PLAIN, 1, (1, 64, 14, 14), "onednn", "onednn"),  # 75,264.
        ((384, 64, 1, 1), STRIDED, 1, (1, 64, 14, 14), "onednn", "fbgemm"),  # 18,816.
        ((64, 384, 1, 1), PLAIN, 1, (8, 384, 14, 14), "onednn", "onednn"),
        ((32, 144, 1, 1), PLAIN, 1, (1, 144, 28, 28), "onednn", "onednn"),  # 25,088.
        ((96, 12, 1, 1), PLAIN, 2, (1, 24, 1, 1), "onednn", "onednn"),
        ((256, 1, 3, 3), PADDED, 256, (1, 256, 14, 14), "fbgemm", "onednn"),
        ((256, 1, 3, 3), PLAIN, 256, (1, 256, 14, 14), "onednn", "onednn"),
        ((96, 1, 3, 3), PADDED, 96, (1, 96, 14, 14), "onednn", "onednn"),
        ((64, 64, 3, 3), PADDED, 1, (1, 64, 7, 7), "onednn", "onednn"),
    ],
)
def test_the_fastest_engine(weight, geometry, groups, shape, without_vnni, with_vnni):
    values = torch.ones(weight, dtype=torch.int8)
    for has_vnni, engine in ((False, without_vnni), (True, with_vnni)):
        assert engine_of_conv(values, (*geometry, groups), 255, torch.Size(shape), has_vnni) == engine


def test_depthwise_weights_whose_pairs_could_saturate_stay_with_the_engine_that_adds_none():
    weight = torch.full((256, 1, 3, 3), 100, dtype=torch.int8)
    for input_max, engine in ((255, "onednn"), (127, "fbgemm")):
        assert engine_of_conv(weight, (*PADDED, 256), input_max, torch.Size((1, 256, 9, 9)), False) == engine
