"""The variational families, and where a guide keeps loc and scale."""

from pyro_lottery.guides.build import NAMED, auto, by_name, check_name, made_by
from pyro_lottery.guides.check import check_guide, check_sites
from pyro_lottery.guides.dropout import McDropout, mc_dropout
from pyro_lottery.guides.found import Found, Laplace, Swag, laplace, swag
from pyro_lottery.guides.ivon import Ivon, ivon
from pyro_lottery.guides.langevin import Sghmc, Sgld, sghmc, sgld
from pyro_lottery.guides.mean_field import MeanField, mean_field
from pyro_lottery.guides.point import Point, deterministic
from pyro_lottery.guides.state import (
    DRAWS,
    active_masks,
    compressed,
    decay_of_prior,
    drawn_from,
    is_point,
    locs,
    moved_moments,
    not_finite,
    parameter_groups,
    posterior,
    scales_are_trained,
    set_posterior_,
    set_posterior_at_,
    training_point,
    values_at_loc,
    zero_pruned_,
)

__all__ = [
    "DRAWS", "NAMED", "Found", "Ivon", "Laplace", "McDropout", "MeanField", "Point", "Sghmc", "Sgld", "Swag", "active_masks", "auto", "by_name", "check_guide", "check_name", "check_sites",
    "compressed", "decay_of_prior", "deterministic", "drawn_from", "is_point", "ivon", "laplace", "locs", "made_by", "mc_dropout", "mean_field", "moved_moments", "not_finite", "parameter_groups",
    "posterior", "scales_are_trained", "set_posterior_", "set_posterior_at_", "sghmc", "sgld", "swag", "training_point", "values_at_loc", "zero_pruned_",
]  # fmt: skip
