"""Flat parameters: their state dict, their layout, and their compression under a mask."""

import copy

import pytest
import torch
from torch import nn

import pyro_lottery as pl
from pyro_lottery import guides


def test_parameters_are_complete_before_first_use_and_load_into_a_fresh_object(tiny_model, tiny_data):
    guide = pl.guides.mean_field(tiny_model)
    names = dict(guide.named_parameters())
    state = {f"{kind}.{s}": torch.randn(shape) for kind in ("loc", "log_scale") for s, shape in guide.shapes.items()}
    assert set(guide.state_dict()) == set(state)
    guide.load_state_dict(state, strict=True)
    guide(tiny_data.test[:2])
    assert set(dict(guide.named_parameters())) == set(names)
    assert all(torch.equal(value, state[name]) for name, value in guide.state_dict().items())


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_compressed_keeps_only_what_survives_and_puts_it_back(make, tiny_model, half_mask):
    guide = make(tiny_model)
    before, parameter = pl.posterior(guide), guide.loc
    survivors = sum(int(m.sum()) for m in half_mask.values())
    others = sum(v.numel() for n, v in before.loc.items() if n not in half_mask)
    with pl.handlers.sparsify(half_mask), guides.compressed(guide):
        assert all(p.numel() == survivors + others for p in guide.parameters())
        for site, value in guide().items():
            if site in half_mask:
                assert not value[~half_mask[site]].any()
        with torch.no_grad():
            guide.loc.add_(1)
        state = {name: value.clone() for name, value in guide.state_dict().items()}
        with torch.no_grad():
            guide.loc.zero_()
        guide.load_state_dict(state)
        inside = pl.posterior(guide)
    assert guide.loc is parameter
    after = pl.posterior(guide)
    for site, loc in before.loc.items():
        mask = half_mask.get(site, torch.ones_like(loc, dtype=torch.bool))
        for found in (inside, after):
            assert torch.equal(found.loc[site], torch.where(mask, loc + 1, 0.0))
        if before.scale is not None:
            assert torch.equal(inside.scale[site], torch.where(mask, before.scale[site], 0.0))
            assert torch.equal(after.scale[site], before.scale[site])


def test_a_compressed_guide_refuses_another_mask(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    other = {site: ~mask for site, mask in half_mask.items()}
    compressed = (pl.handlers.sparsify(half_mask), guides.compressed(guide))
    with compressed[0], compressed[1], pytest.raises(pl.UserError, match="another mask"), pl.handlers.sparsify(other):
        guide()
    guide()


def test_compression_nests_keeps_frozen_parameters_frozen_and_copies(tiny_model, half_mask):
    guide = pl.guides.mean_field(tiny_model)
    guide.log_scale.requires_grad_(False)
    size = guide.loc.numel()
    with pl.handlers.sparsify(half_mask), guides.compressed(guide):
        kept = guide.loc.numel()
        with guides.compressed(guide):
            guide()
        assert guide.loc.numel() == kept < size
        assert not guide.log_scale.requires_grad
        copy.deepcopy(guide)()
        with pytest.raises(pl.UserError, match="cannot be set"):
            pl.guides.set_posterior_(guide, pl.posterior(guide))
    assert guide.loc.numel() == size


def test_a_state_dict_that_does_not_fit_is_refused_by_site(tiny_model):
    guide = pl.guides.mean_field(tiny_model)
    state = guide.state_dict()
    wrong = state | {"loc.out.bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"loc\.out\.bias is \(4,\), but the site is \(3,\)"):
        guide.load_state_dict(wrong)
    del state["log_scale.conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*log_scale\.conv\.weight"):
        guide.load_state_dict(state | {"loc.nothing": torch.zeros(1)})


def test_a_guides_state_is_loaded_though_another_modules_is_missing(tiny_model):
    both = nn.ModuleDict({"other": nn.Linear(2, 2), "guide": pl.guides.mean_field(tiny_model)})
    state = {name: torch.ones_like(v) for name, v in both.state_dict().items() if name.startswith("guide.")}
    both.load_state_dict(state, strict=False)
    assert (both["guide"].loc == 1).all()


def test_convolution_weights_lie_in_channels_last_order(tiny_model):
    assert all(
        v.is_contiguous(memory_format=torch.channels_last)
        for v in pl.guides.mean_field(tiny_model)().values()
        if v.ndim == 4
    )


@pytest.mark.parametrize("make", [pl.guides.mean_field, pl.guides.deterministic])
def test_several_draws_look_the_surviving_weights_up_once_and_change_no_parameter(make, tiny_model, half_mask):
    guide = make(tiny_model)
    own, values = dict(guide.named_parameters()), {n: p.clone() for n, p in guide.named_parameters()}

    def draw():
        torch.manual_seed(3)
        return guide()

    with pl.handlers.sparsify(half_mask):
        expected = draw()
        with pl.guides.drawn_from(guide):
            found, kept = draw(), guide.under_masks()[1][0]
            assert guide.under_masks()[1][0] is kept
            with pl.handlers.sparsify({n: torch.zeros_like(m) for n, m in half_mask.items()}):
                assert all(not guide()[name].any() for name in half_mask), "under another mask within"
        assert guide.under_masks()[1][0] is not kept
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert dict(guide.named_parameters()).keys() == own.keys()
    assert all(guide.get_parameter(n) is p and torch.equal(p, values[n]) for n, p in own.items())
