"""The evidence lower bound, with separate likelihood and KL terms and without synchronising with the host."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lottery.distributions import Draw, PointMass, SiteNormal, base, elementary, one_number
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers import DrawsApart, as_drawn, local_reparameterization
from pyro_lottery.priors.improper import Flat
from pyro_lottery.threads import in_turn

KL_KINDS = ("analytic", "monte_carlo")
ESTIMATORS = ("weights", "local")


@dataclass(frozen=True)
class Terms:
    """The negative ELBO, nll + T·KL, for one weight sample: two scalars in nats, and the model's return value."""

    nll: Tensor
    """Scaled up from the batch to N examples."""
    tempered_kl: Tensor
    """T·KL. Model and guide multiply by the KL temperature T, or by another factor, in ``poutine.scale``."""
    output: Any


class ELBO(Trace_ELBO):
    """The loss −ELBO = −E_q[log p(D|w)] + T·KL(q‖p), which replaces Pyro's ``Trace_ELBO`` for any model and guide.

    ``kl="analytic"`` uses ``kl_divergence(q, p)`` for each site for which torch or Pyro has a closed form and whose draw
    the guide makes independently of all other sites, and the Monte Carlo value log q − log p otherwise.
    ``kl="monte_carlo"`` always uses the latter, like ``Trace_ELBO``. ``estimator="weights"`` draws every weight once per
    batch; ``"local"`` draws the outputs of layers (``pl.handlers.local_reparameterization``).

    ``Trace_ELBO`` handles sites without a reparameterised sample, factors, plates and ``vectorize_particles``; its other
    ``options`` are accepted too. ``poutine.scale`` and ``poutine.mask`` are respected. ``pyro.optim`` does not know
    parameters by name (``get_state``, options by name), since they belong to the modules.

    Raises ``UserError`` if ``kl`` or ``estimator`` is unknown, if only the model or only the guide has a site, or if the
    guide lacks the KL temperature of the network's prior.
    """

    def __init__(self, kl: str = "analytic", num_particles: int = 1, estimator: str = "weights", **options: Any):
        super().__init__(num_particles=num_particles, **options)
        if kl not in KL_KINDS:
            raise unknown("kl", kl, KL_KINDS)
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        self.kl = kl
        self._local = estimator == "local"
        self._noise: Any = local_reparameterization() if self._local else nullcontext()

    @in_turn
    def terms(self, model: Any, guide: Any, *args: Any, closed_forms: float = 1.0, **kwargs: Any) -> Terms:
        """The :class:`Terms` of one weight sample.

        ``closed_forms`` multiplies the closed-form KL of a mean-field guide from priors N(m, s²). This KL is the same for
        all of S samples, so S for the first sample and 0 for the others gives the same mean at the cost of one. Raises
        ``UserError`` if a site of the guide has no reparameterised sample, since the gradient would be wrong.
        """
        # This library's guides are known to draw every site independently, so they need no DrawsApart.
        draws = DrawsApart() if self.kl == "analytic" and not _draws_apart(guide) else None
        with self._noise:
            with draws or nullcontext():
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = as_drawn(poutine.replay(model, trace=guide_trace))
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        _check_traces(model_trace, guide_trace, tempered=True)
        posteriors = {n: s for n, s in guide_trace.nodes.items() if _is_random(s)}
        for name, q in posteriors.items():
            fn: Any = q["fn"]
            if not fn.has_rsample:
                raise UserError(
                    f"the guide's site {name!r} has no reparameterised sample; call loss_and_grads, as SVI does, which needs none"
                )
        nll: Any = 0.0
        tempered_kl: Any = 0.0
        shared: dict[Draw, list[tuple[int, Tensor, Tensor, Any]]] = {}
        for name, site in model_trace.nodes.items():
            if not _is_random(site):
                continue
            if site["is_observed"]:
                nll = nll - _log_prob(site)
                continue
            q = posteriors[name]
            if _adds_nothing(q, site):
                del posteriors[name]
                continue
            apart = name in draws.names if draws else self.kl == "analytic"
            own = base(q["fn"])
            if apart and isinstance(own, SiteNormal) and site["mask"] is None:
                prior = one_number(site["fn"], own.kept)
                if prior is not None:
                    shared.setdefault(own.draw, []).append((own.number, *prior, site["scale"]))
                    del posteriors[name]
                    continue
            closed = _closed_form(q, site) if apart else None
            if closed is not None:
                tempered_kl = tempered_kl + closed
                del posteriors[name]
                continue
            tempered_kl = tempered_kl - _log_prob(site)
        if closed_forms:
            for draw, sites in shared.items():
                shared_kl = _shared_kl(draw, sites)
                shared_kl = shared_kl if closed_forms == 1 else closed_forms * shared_kl
                tempered_kl = tempered_kl + shared_kl if isinstance(tempered_kl, Tensor) else shared_kl
        for site in posteriors.values():  # sites without a closed form, and the auxiliary draw of a joint guide
            tempered_kl = tempered_kl + _log_prob(site)
        nll = torch.as_tensor(nll)
        if not isinstance(tempered_kl, Tensor):  # made where nll is, for a copy to a GPU would wait for it
            tempered_kl = nll.new_full((), tempered_kl)
        return Terms(nll, tempered_kl, model_trace.nodes["_RETURN"]["value"])

    @in_turn
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """−ELBO averaged over ``num_particles`` weight samples, as a scalar tensor with gradients."""
        if not self._own(model, guide):
            return super().differentiable_loss(model, guide, *args, **kwargs)
        terms = [self.terms(model, guide, *args, **kwargs) for _ in range(self.num_particles)]
        return torch.stack([t.nll + t.tempered_kl for t in terms]).mean()

    @in_turn
    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO averaged over ``num_particles`` weight samples, as a number."""
        if self._own(model, guide):
            return self.differentiable_loss(model, guide, *args, **kwargs).item()
        traces = self._get_traces(model, guide, args, kwargs)
        return sum(self._differentiable_loss_particle(*pair)[0] / self.num_particles for pair in traces)

    @in_turn
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Add the gradients of −ELBO to the parameters, and return −ELBO as a number; ``pyro.infer.SVI`` calls this."""
        if not self._own(model, guide):
            return super().loss_and_grads(model, guide, *args, **kwargs)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _own(self, model: Any, guide: Any) -> bool:
        """Whether to use ``terms``: for a network with its mean-field guide, and for local reparameterization."""
        ours = _draws_apart(guide) and guide.model is model and hasattr(model, "kl_temperature")
        return self._local or (ours and not self.vectorize_particles)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        draws = None
        # A guide that is a messenger runs the model, which computes with its draws.
        if self.kl == "analytic" and not isinstance(poutine.unwrap(guide), Messenger):
            draws = DrawsApart()
            guide = draws(guide)
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _check_traces(model_trace, guide_trace, tempered=hasattr(poutine.unwrap(model), "kl_temperature"))
        for name in draws.names if draws else ():
            if name in guide_trace.nodes:  # a handler may hide it from the trace
                guide_trace.nodes[name]["drawn_apart"] = True
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        """``Trace_ELBO``'s value and surrogate, with closed forms in place of Monte Carlo values.

        A site that is drawn apart is independent of all others under the guide. The closed form is therefore the
        expectation of log q − log p over this site given all others, even if its prior depends on them.
        """
        loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
        for name, q in guide_trace.nodes.items():
            p = model_trace.nodes.get(name)
            if "drawn_apart" not in q or not q["fn"].has_rsample or p is None or p["is_observed"]:
                continue
            closed = _closed_form(q, p)
            if closed is not None:
                loss = loss + (closed - q["log_prob_sum"] + p["log_prob_sum"]).item()
                surrogate = surrogate + closed - q["score_parts"].entropy_term.sum() + p["log_prob_sum"]
        return loss, surrogate


def _adds_nothing(q: Any, p: Any) -> bool:
    """Whether log q − log p is 0 for every value: a point guide's point mass against the flat prior."""
    return isinstance(q["fn"], PointMass) and not q["is_observed"] and isinstance(elementary(p["fn"]), Flat)


def _draws_apart(guide: Any) -> bool:
    """Whether a guide is known to draw each site independently, so that closed forms hold for all priors."""
    return getattr(guide, "draws_sites_apart", False)


def _check_traces(model_trace: Any, guide_trace: Any, tempered: bool) -> None:
    """Raise ``UserError`` if the model or the guide lacks a site, or if the guide lacks the prior's temperature."""
    latent = {n: s for n, s in model_trace.nodes.items() if _is_random(s) and not s["is_observed"]}
    drawn = {n: s for n, s in guide_trace.nodes.items() if _is_random(s) and not s["is_observed"]}
    for name, p in latent.items():
        if name not in drawn:
            raise UserError(
                f"the guide does not sample site {name!r} of the model; sample it in the guide, or hide it with poutine.block"
            )
        q = drawn[name]
        if tempered and q["scale"] is not p["scale"] and not _equal(q["scale"], p["scale"]):
            raise UserError(
                f"site {name!r}: the prior is scaled by {p['scale']} but the guide by {q['scale']}; "
                "build the guide with pyro_lottery.guides, which applies the KL temperature to both"
            )
    for name, q in drawn.items():
        if name not in latent and not q["infer"].get("is_auxiliary"):
            raise UserError(
                f"the guide samples site {name!r}, which the model does not sample; remove it from the guide"
            )


def _equal(a: Any, b: Any) -> bool:
    same = a == b
    return bool(same.all()) if isinstance(same, Tensor) else bool(same)


def _closed_form(q: Any, p: Any) -> Tensor | None:
    """A site's closed-form KL, scaled and masked; None if there is none, or if q and p are scaled or masked differently."""
    same = q["mask"] is p["mask"] and (q["scale"] is p["scale"] or _equal(q["scale"], p["scale"]))
    if not same or not _has_kl(q["fn"], p["fn"]) or q["fn"].shape() != p["fn"].shape():
        return None
    try:
        value = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return torch.as_tensor(scale_and_mask(value, p["scale"], p["mask"])).sum()


def _has_kl(q: Any, p: Any) -> bool:
    """Whether ``kl_divergence``, if it has a closed form, is the expectation of log q − log p with the right gradient."""
    q, p = base(q), base(p)
    if isinstance(q, dist.MaskedDistribution) and isinstance(p, dist.MaskedDistribution):
        # Pyro's KL is over the intersection of the masks, whereas each log density has its own mask.
        return (q._mask is p._mask or _equal(q._mask, p._mask)) and _has_kl(q.base_dist, p.base_dist)
    # torch has a "closed form" for Delta against any distribution: −log p of its value. This is a Monte Carlo value
    # (AutoNormal) or simply −log p (a point guide), and is treated as such.
    return not isinstance(q, dist.Delta) and _keeps_kl(q) and _keeps_kl(p)


def _keeps_kl(fn: Any) -> bool:
    """False if torch's KL ignores a transformation that merges values, or that training changes."""
    if not isinstance(fn, torch.distributions.TransformedDistribution) or isinstance(fn, _WITH_OWN_KL):
        return True
    return all(isinstance(t, torch.distributions.ExpTransform) for t in fn.transforms)


_WITH_OWN_KL = (dist.Gumbel, dist.HalfNormal, dist.Pareto)


def _shared_kl(draw: Draw, sites: list[tuple[int, Tensor, Tensor, Any]]) -> Tensor:
    """The KL of a draw's sites, given as (number, loc and scale of the prior, factor), in one pass over the weights."""
    number, locs, scales, factors = zip(*sites, strict=True)
    every = len(sites) == len(draw.layout.shapes)
    loc, scale = dict(zip(number, locs, strict=True)), dict(zip(number, scales, strict=True))
    if not every:  # sites with another KL, which the draw's kernel computes too
        zero, one = draw.loc.new_zeros(()), draw.loc.new_ones(())
        loc, scale = (
            {i: of.get(i, other) for i in range(len(draw.layout.shapes))} for of, other in ((loc, zero), (scale, one))
        )
    kl = draw.kl(*(torch.stack([of[i] for i in range(len(of))]) for of in (loc, scale)))
    if every and all(factor is factors[0] or factor == factors[0] for factor in factors):
        return kl.sum() * factors[0]
    return torch.stack([kl[i] * factor for i, factor in zip(number, factors, strict=True)]).sum()


def _is_random(site: Any) -> bool:
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


def _log_prob(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
