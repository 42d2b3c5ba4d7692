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
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lottery.distributions import Draw, SiteNormal, base, one_number
from pyro_lottery.errors import UserError, unknown
from pyro_lottery.handlers import DrawsApart, local_reparameterization
from pyro_lottery.threads import in_turn

KL_KINDS = ("analytic", "monte_carlo")
ESTIMATORS = ("weights", "local")


@dataclass(frozen=True)
class Terms:
    """One weight sample's share of the negative ELBO: ``nll`` (scaled up to N) and ``kl`` (times T), in nats."""

    nll: Tensor
    kl: Tensor
    output: Any


class ELBO(Trace_ELBO):
    """−ELBO = −E_q[log p(D|w)] + T·KL(q‖p), a drop-in for Pyro's ``Trace_ELBO`` on any model and guide.

    ``kl="analytic"`` takes ``kl_divergence(q, p)`` for each site where torch or Pyro has a closed form and the guide
    draws the site apart from all others, and otherwise the Monte Carlo value log q − log p; ``"monte_carlo"`` always
    takes the latter, as ``Trace_ELBO`` does. Sites without a reparameterised sample, factors, plates and
    ``vectorize_particles`` are ``Trace_ELBO``'s, whose other ``options`` are taken too. ``poutine.scale`` and
    ``poutine.mask`` are honoured. ``estimator`` says where the noise enters: ``"weights"`` draws every weight once per
    batch, ``"local"`` the outputs of layers (:func:`pyro_lottery.handlers.local_reparameterization`).

    Raises ``UserError`` for a site that model or guide alone has, and for a guide that does not have the KL temperature
    of a network's prior. Names of parameters are not known to ``pyro.optim`` (``get_state``, options by name): parameters
    are the modules' own.
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
        """One weight sample: scalar tensors ``nll`` and ``kl``, and what the model returned.

        ``closed_forms`` multiplies the closed-form KL of a mean-field guide from priors N(m, s²). It is the same for
        each of S samples: S for the first and 0 for the others gives the same mean for the cost of one. Raises
        ``UserError`` for a guide's site without a reparameterised sample, whose gradient is not that of these terms.
        """
        # Of our guides it is known that they draw every site apart, and need not be watched.
        draws = DrawsApart() if self.kl == "analytic" and not _draws_apart(guide) else None
        with self._noise:
            with draws or nullcontext():
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        _check_traces(model_trace, guide_trace, tempered=True)
        posteriors = {n: s for n, s in guide_trace.nodes.items() if _is_random(s)}
        for name, q in posteriors.items():
            fn: Any = q["fn"]
            if not fn.has_rsample:
                raise UserError(
                    f"the guide's site {name!r} has no reparameterised sample; use loss_and_grads, as SVI does"
                )
        nll: Any = 0.0
        kl: Any = 0.0
        shared: dict[Draw, list[tuple[int, Tensor, Tensor, Any]]] = {}
        for name, site in model_trace.nodes.items():
            if not _is_random(site):
                continue
            if site["is_observed"]:
                nll = nll - _log_prob(site)
                continue
            q = posteriors[name]
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
                kl = kl + closed
                del posteriors[name]
                continue
            kl = kl - _log_prob(site)
        if closed_forms:
            for draw, sites in shared.items():
                kl = kl + closed_forms * _shared_kl(draw, sites)
        for site in posteriors.values():  # sites without a closed form, and a joint guide's auxiliary vector
            kl = kl + _log_prob(site)
        return Terms(torch.as_tensor(nll), torch.as_tensor(kl), model_trace.nodes["_RETURN"]["value"])

    @in_turn
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """−ELBO averaged over ``num_particles`` weight samples, as a tensor to differentiate."""
        if not self._own(model, guide):
            return super().differentiable_loss(model, guide, *args, **kwargs)
        terms = [self.terms(model, guide, *args, **kwargs) for _ in range(self.num_particles)]
        return torch.stack([t.nll + t.kl for t in terms]).mean()

    @in_turn
    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a number."""
        if self._own(model, guide):
            return self.differentiable_loss(model, guide, *args, **kwargs).item()
        traces = self._get_traces(model, guide, args, kwargs)
        return sum(self._differentiable_loss_particle(*pair)[0] / self.num_particles for pair in traces)

    @in_turn
    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a number after its gradients were added to the parameters (what ``pyro.infer.SVI`` calls)."""
        if not self._own(model, guide):
            return super().loss_and_grads(model, guide, *args, **kwargs)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _own(self, model: Any, guide: Any) -> bool:
        """Whether :meth:`terms` is the estimator: a network and its mean-field guide, or noise in layers."""
        ours = _draws_apart(guide) and guide.model is model and hasattr(model, "kl_temperature")
        return self._local or (ours and not self.vectorize_particles)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        draws = None
        # A messenger as a guide runs the model itself, and computes with what it draws.
        if self.kl == "analytic" and not isinstance(poutine.unwrap(guide), Messenger):
            draws = DrawsApart()
            guide = draws(guide)
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _check_traces(model_trace, guide_trace, tempered=hasattr(poutine.unwrap(model), "kl_temperature"))
        for name in draws.names if draws else ():
            if name in guide_trace.nodes:  # and not hidden from the trace by a handler
                guide_trace.nodes[name]["drawn_apart"] = True
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        """``Trace_ELBO``'s value and surrogate, with closed forms in place of their Monte Carlo values.

        A site that is drawn apart is independent of all others under the guide. So the closed form is the expectation
        of log q − log p over it, given all others, whatever of them its prior depends on.
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


def _draws_apart(guide: Any) -> bool:
    """Whether a guide is known to draw each site by itself, so that closed forms hold whatever their priors depend on."""
    return getattr(guide, "draws_sites_apart", False)


def _check_traces(model_trace: Any, guide_trace: Any, tempered: bool) -> None:
    """Raise ``UserError`` for a site that one of both lacks, and for a guide's without the prior's temperature."""
    latent = {n: s for n, s in model_trace.nodes.items() if _is_random(s) and not s["is_observed"]}
    drawn = {n: s for n, s in guide_trace.nodes.items() if _is_random(s) and not s["is_observed"]}
    for name, p in latent.items():
        if name not in drawn:
            raise UserError(f"the guide does not sample site {name!r} of the model")
        q = drawn[name]
        if tempered and q["scale"] is not p["scale"] and not _equal(q["scale"], p["scale"]):
            raise UserError(
                f"site {name!r}: the prior is scaled by {p['scale']} but the guide by {q['scale']}; "
                "build the guide with pyro_lottery.guides, which share the KL temperature"
            )
    for name, q in drawn.items():
        if name not in latent and not q["infer"].get("is_auxiliary"):
            raise UserError(f"the guide samples site {name!r}, which the model does not sample")


def _equal(a: Any, b: Any) -> bool:
    return bool(torch.as_tensor(a == b).all())


def _closed_form(q: Any, p: Any) -> Tensor | None:
    """The KL of a site in closed form, scaled and masked; None where there is none, or q and p are scaled differently."""
    same = q["mask"] is p["mask"] and (q["scale"] is p["scale"] or _equal(q["scale"], p["scale"]))
    if not same or not _has_kl(q["fn"], p["fn"]) or q["fn"].shape() != p["fn"].shape():
        return None
    try:
        value = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return torch.as_tensor(scale_and_mask(value, p["scale"], p["mask"])).sum()


def _has_kl(q: Any, p: Any) -> bool:
    """Whether ``kl_divergence``, if it knows a closed form, gives the expectation of log q − log p and its gradient."""
    q, p = base(q), base(p)
    if isinstance(q, dist.MaskedDistribution) and isinstance(p, dist.MaskedDistribution):
        # Pyro's is over what both masks keep, whereas each log-density has its own.
        return (q._mask is p._mask or _equal(q._mask, p._mask)) and _has_kl(q.base_dist, p.base_dist)
    # torch has a "closed form" for Delta against anything: minus the log-probability of the value, which is Monte
    # Carlo in disguise (AutoNormal) or simply log p (a point guide). Both are counted as what they are.
    return not isinstance(q, dist.Delta) and _keeps_kl(q) and _keeps_kl(p)


def _keeps_kl(fn: Any) -> bool:
    """False for what torch takes the KL of before a transformation that merges values, or that training changes."""
    if not isinstance(fn, torch.distributions.TransformedDistribution) or isinstance(fn, _WITH_OWN_KL):
        return True
    return all(isinstance(t, torch.distributions.ExpTransform) for t in fn.transforms)


_WITH_OWN_KL = (dist.Gumbel, dist.HalfNormal, dist.Pareto)


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


def _log_prob(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()
