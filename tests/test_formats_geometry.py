"""A site from a file, in the terms of the module that the model has."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_formats_support import KIND_SPECS, dense, make_site

from lora_inject.errors import FormatError
from lora_inject.formats import conform
from lora_inject.spec.sites import SiteSpec

LINEAR = SiteSpec("fc", "linear", 5, 7, (7, 5), 2, 4.0, weight="fc.weight", dropout=0.1)
CONV1D = SiteSpec("fc", "conv1d", 5, 7, (5, 7), 1, 1.0, transposed=True, weight="fc.weight")


@pytest.mark.parametrize("derived", [False, True])
def test_a_linear_pair_may_be_a_conv1ds(derived: bool) -> None:
    site = make_site(LINEAR, derived=derived)
    fitted = conform(site, CONV1D)
    assert torch.equal(dense(fitted), dense(site).T)
    assert (fitted.spec.kind, fitted.spec.rank, fitted.spec.alpha, fitted.spec.dropout) == (
        "conv1d",
        2,
        4.0,
        0.1,
    )


@pytest.mark.parametrize("kind", KIND_SPECS)
@pytest.mark.parametrize("derived", [False, True])
def test_the_same_geometry_changes_nothing(kind: str, derived: bool) -> None:
    site = make_site(KIND_SPECS[kind], derived=derived)
    here = dataclasses.replace(site.spec, rank=1, alpha=9.0, slices=None)
    fitted = conform(site, here)
    assert fitted.spec == site.spec
    assert torch.equal(dense(fitted), dense(site))


@pytest.mark.parametrize("derived", [False, True])
def test_experts_until_peft_0_18_are_turned(derived: bool) -> None:
    """Its delta is right in the weight's own shape; the model's spec sees that shape otherwise."""
    old = SiteSpec("moe.up", "parameter", 7, 5, (3, 7, 5), 2, 4.0, transposed=True, experts=3)
    site = make_site(old, derived=derived)
    fitted = conform(site, dataclasses.replace(KIND_SPECS["experts"], rank=1))
    assert not fitted.spec.transposed
    torch.testing.assert_close(dense(fitted), dense(site))


def test_experts_of_a_transposed_module_keep_their_pair() -> None:
    site = make_site(KIND_SPECS["experts"])
    fitted = conform(site, KIND_SPECS["turned experts"])
    torch.testing.assert_close(dense(fitted), dense(site).mT)


@pytest.mark.parametrize(
    "here",
    [
        dataclasses.replace(LINEAR, in_features=6, weight_shape=(7, 6)),
        dataclasses.replace(LINEAR, kind="embedding", transposed=True, weight_shape=(5, 7)),
        dataclasses.replace(KIND_SPECS["experts"], name="fc"),
    ],
)
def test_other_modules_are_refused(here: SiteSpec) -> None:
    with pytest.raises(FormatError, match="the file has a linear of 5 -> 7, the model"):
        conform(make_site(LINEAR), here)


def test_slices_only_fit_their_own_geometry() -> None:
    here = dataclasses.replace(CONV1D, out_features=8, weight_shape=(5, 8))
    with pytest.raises(FormatError, match="another model"):
        conform(make_site(KIND_SPECS["slices"]), here)
