"""Padding and cropping: what nnU-Net's targets are, and networks that take one size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnunetv2_lightnets import LightNetsError
from nnunetv2_lightnets.networks.padding import crop_heads, crop_to, pad_to_bound, pad_to_multiple, total_stride


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (9, 100), (41, 20)])
@pytest.mark.parametrize("scales", [(1, 1 / 2, 1 / 4, 1 / 8), (1, 1 / 4, 1 / 8, 1 / 16)])
def test_heads_are_cropped_to_nnunets_targets(size: tuple[int, int], scales: tuple[float, ...]) -> None:
    padded = [-side % 32 + side for side in size]
    heads = [torch.arange(1.0 * int(padded[0] * s) * int(padded[1] * s)) for s in scales]
    heads = [head.view(1, 1, int(padded[0] * s), -1) for head, s in zip(heads, scales, strict=True)]
    targets = DownsampleSegForDSTransform([[s, s] for s in scales])(segmentation=torch.zeros(1, *size))
    cropped = crop_heads(heads, size, [(s, s) for s in scales])
    for head, kept, target in zip(heads, cropped, targets["segmentation"], strict=True):
        assert kept.shape[2:] == target.shape[1:]
        assert (kept == head[:, :, : kept.shape[2], : kept.shape[3]]).all()


def test_no_head_is_cropped_away() -> None:
    heads = crop_heads([torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 2, 2)], (8, 12), [(1, 1), (1 / 16, 1 / 16)])
    assert [tuple(head.shape[2:]) for head in heads] == [(8, 12), (1, 1)]


def test_padding_is_at_the_end_with_zeros_and_cropping_undoes_it() -> None:
    x = torch.randn(2, 1, 5, 6, 8)
    padded = pad_to_multiple(x, (4, 3, 5))
    assert torch.equal(padded, F.pad(x, (0, 2, 0, 0, 0, 3)))
    assert torch.equal(crop_to(padded, (5, 6, 8)), x)
    assert crop_to(padded, (5, 6, 8)).is_contiguous()
    assert pad_to_multiple(x, (5, 2, 4)) is x and crop_to(x, (5, 6, 8)) is x
    assert total_stride(((1, 2, 2), (2, 2, 3))) == (2, 4, 6)


def test_a_network_bound_to_a_size_refuses_larger_ones() -> None:
    x = torch.randn(1, 1, 4, 6)
    assert torch.equal(pad_to_bound(x, (4, 8), "net"), F.pad(x, (0, 2)))
    with pytest.raises(LightNetsError, match=r"net was built for patches of 8 x 5 voxels.* takes none of 4 x 6"):
        pad_to_bound(x, (8, 5), "net")
