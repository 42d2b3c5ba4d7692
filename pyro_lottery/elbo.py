"""The evidence lower bound, with the likelihood and the KL apart and without reading anything to the host."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lottery.distributions import Draw, SiteNormal, base, one_number
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers import local_reparameterization

KL_KINDS = ("analytic", "monte_carlo")
ESTIMATORS = ("weights", "local")


@dataclass(frozen=True)
class Terms:
    """One weight sample's share of the negative ELBO: ``nll`` (scaled up to N) and ``kl`` (times T), in nats."""

    nll: Tensor
    kl: Tensor
    output: Any


class ELBO(Trace_ELBO):
    """−ELBO = −E_q[log p(D|w)] + T·KL(q‖p), a drop-in for Pyro's ``Trace_ELBO`` with reparameterised guides.

    ``kl="analytic"`` takes ``kl_divergence(q, p)`` for each site where torch or Pyro has a closed form and otherwise
    the Monte Carlo value log q − log p; ``"monte_carlo"`` always takes the latter, as ``Trace_ELBO`` does.
    ``poutine.scale`` and ``poutine.mask`` are honoured. ``estimator`` says where the noise enters: ``"weights"`` draws
    every weight once per batch, ``"local"`` the outputs of layers (:func:`pyro_lottery.handlers.local_reparameterization`).
    """

    def __init__(self, kl: str = "analytic", num_particles: int = 1, estimator: str = "weights"):
        super().__init__(num_particles=num_particles)
        if kl not in KL_KINDS:
            raise unknown("kl", kl, KL_KINDS)
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        self.kl = kl
        self._noise: Any = local_reparameterization() if estimator == "local" else nullcontext()

    def terms(self, model: Any, guide: Any, *args: Any, closed_forms: float = 1.0, **kwargs: Any) -> Terms:
        """One weight sample: scalar tensors ``nll`` and ``kl``, and what the model returned.

        ``closed_forms`` multiplies the closed-form KL of a mean-field guide from priors N(m, s²). It is the same for
        each of S samples: S for the first and 0 for the others gives the same mean for the cost of one.
        """
        with self._noise:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        posteriors = {n: s for n, s in guide_trace.nodes.items() if _is_random(s)}
        nll: Any = 0.0
        kl: Any = 0.0
        shared: dict[Draw, list[tuple[int, Tensor, Tensor, Any]]] = {}
        for name, site in model_trace.nodes.items():
            if not _is_random(site):
                continue
            if site["is_observed"]:
                nll = nll - _log_prob(site)
                continue
            if name not in posteriors:
                raise UserError(f"the guide does not sample site {name!r} of the model")
            q = posteriors[name]
            if q["scale"] is not site["scale"] and q["scale"] != site["scale"]:
                raise UserError(
                    f"site {name!r}: the prior is scaled by {site['scale']} but the guide by {q['scale']}; "
                    "build the guide with pyro_lottery.guides, which share the KL temperature"
                )
            own = base(q["fn"])
            if isinstance(own, SiteNormal) and self.kl == "analytic" and site["mask"] is None:
                prior = one_number(site["fn"], own.kept)
                if prior is not None:
                    shared.setdefault(own.draw, []).append((own.number, *prior, site["scale"]))
                    del posteriors[name]
                    continue
            closed = self._closed_form(q, site)
            if closed is not None:
                kl = kl + closed
                del posteriors[name]
                continue
            if q["infer"].get("only_moments"):  # under local reparameterization nobody has drawn this weight yet
                q["value"] = site["value"] = q["fn"].rsample()
            kl = kl - _log_prob(site)
        if closed_forms:
            for draw, sites in shared.items():
                kl = kl + closed_forms * _shared_kl(draw, sites)
        for site in posteriors.values():  # sites without a closed form, and a joint guide's auxiliary vector
            kl = kl + _log_prob(site)
        return Terms(torch.as_tensor(nll), torch.as_tensor(kl), model_trace.nodes["_RETURN"]["value"])

    def _closed_form(self, q: Any, p: Any) -> Tensor | None:
        if self.kl == "monte_carlo" or _is_point_mass(q["fn"]):
            return None
        try:
            value = kl_divergence(q["fn"], p["fn"])
        except NotImplementedError:
            return None
        return torch.as_tensor(scale_and_mask(value, p["scale"], p["mask"])).sum()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """−ELBO averaged over ``num_particles`` weight samples, as a tensor to differentiate."""
        terms = [self.terms(model, guide, *args, **kwargs) for _ in range(self.num_particles)]
        return torch.stack([t.nll + t.kl for t in terms]).mean()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a number after its gradients were added to the parameters (what ``pyro.infer.SVI`` calls)."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()


def _shared_kl(draw: Draw, sites: list[tuple[int, Tensor, Tensor, Any]]) -> Tensor:
    """The KL of a draw's sites, given as (number, prior's loc, prior's scale, factor), in one pass over the weights."""
    number, locs, scales, factors = zip(*sites, strict=True)
    loc, scale = [draw.loc.new_zeros(())] * len(draw.layout.shapes), [draw.loc.new_ones(())] * len(draw.layout.shapes)
    for i, m, s in zip(number, locs, scales, strict=True):
        loc[i], scale[i] = m, s
    kl = draw.kl(torch.stack(loc), torch.stack(scale))
    if len(sites) == len(kl) and all(factor is factors[0] or factor == factors[0] for factor in factors):
        return kl.sum() * factors[0]
    return torch.stack([kl[i] * factor for i, factor in zip(number, factors, strict=True)]).sum()


def _is_random(site: Any) -> bool:
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


def _is_point_mass(fn: Any) -> bool:
    # torch has a "closed form" for Delta against anything: minus the log-probability of the value, which is Monte
    # Carlo in disguise (AutoNormal) or simply log p (a point guide). Both are counted as what they are.
    return isinstance(fn, dist.Delta)


def _log_prob(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
