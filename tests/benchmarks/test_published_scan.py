"""The loop that comparisons are made with computes the same scan."""

from __future__ import annotations

import pytest
import torch
from published_scan import use_published_scan

from nnunetv2_lightnets.ops import directional_scan, scan_order, selective_scan, use_backend


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("everything", [False, True])
def test_it_is_the_scan(groups: int, everything: bool) -> None:
    u, delta, z = normal(2, 6, 9), normal(2, 6, 9).abs() / 5, normal(2, 6, 9)
    A, B, C = -normal(6, 4).abs(), normal(2, groups, 4, 9), normal(2, groups, 4, 9)
    more = (normal(6), z, normal(6), True, True) if everything else (None, None, None, False, True)
    with use_published_scan():
        y, last = selective_scan(u, delta, A, B, C, *more)
    with use_backend("reference"):
        expected, expected_last = selective_scan(u, delta, A, B, C, *more)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, expected_last)


def test_it_is_the_scan_along_four_directions() -> None:
    order = scan_order((3, 4))
    arguments = (
        normal(1, 5, 12),
        normal(1, 4, 5, 12),
        -normal(4, 5, 3).abs(),
        normal(1, 4, 3, 12),
        normal(1, 4, 3, 12),
    )
    with use_published_scan():
        y = directional_scan(*arguments, delta_softplus=True, order=order)
    with use_backend("reference"):
        expected = directional_scan(*arguments, delta_softplus=True, order=order)
    torch.testing.assert_close(y, expected)


def test_it_has_no_gradients_that_could_be_taken_for_its_own() -> None:
    u = normal(1, 2, 3).requires_grad_()
    with use_published_scan():
        y = selective_scan(u, u, -normal(2, 2).abs(), normal(1, 2, 3), normal(1, 2, 3))
    assert not y.requires_grad
    assert selective_scan(u, u, -normal(2, 2).abs(), normal(1, 2, 3), normal(1, 2, 3)).requires_grad
