"""Priors on weights: a distribution per weight, a function ``(site, shape) -> distribution``, or a dict of these by glob."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn

from pyro_lottery.errors import UserError, unknown
from pyro_lottery.own_parameters import keep_parameters_
from pyro_lottery.types import Posterior
from pyro_lottery.untrusted import load_callable

# Torch does not say how a mixture's support is reached from the real line, which Pyro's guides ask of every site: as
# that of its components is.
for _registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    _registry.register(
        torch.distributions.constraints.MixtureSameFamilyConstraint,
        lambda constraint, registry=_registry: registry(constraint.base_constraint),
    )

Prior = Callable[[str, Size], dist.TorchDistribution]
AnyPrior = Prior | dist.TorchDistribution | Mapping[str, Prior | dist.TorchDistribution | None]


def of_sites(prior: AnyPrior, sites: Iterable[str]) -> dict[str, Prior | None]:
    """Any kind of prior as a function of site and shape for each site; None for one that is to stay deterministic.

    In a dict of globs over site names the first that matches a site counts: ``{"*.conv1.weight": laplace(0.1), "*":
    normal(1.0)}``, or ``{"layer4.*": normal(1.0), "*": None}``. Raises ``UserError`` for a glob that matches no site,
    with near matches, and for a site without one.
    """
    if not isinstance(prior, Mapping):
        return dict.fromkeys(sites, _function(prior))
    sites, globs = list(sites), {glob: None if value is None else _function(value) for glob, value in prior.items()}
    for glob in globs:
        if not any(fnmatchcase(site, glob) for site in sites):
            near = difflib.get_close_matches(glob.replace("*", ""), sites, n=3, cutoff=0.3) or sites[:3]
            raise UserError(f"the prior's glob {glob!r} matches no site; near: {', '.join(near)}")
    chosen = {site: next((glob for glob in globs if fnmatchcase(site, glob)), None) for site in sites}
    for site, first in chosen.items():
        if first is None:
            raise UserError(f"no glob of the prior matches site {site!r}; add '*' for all others")
    for glob in globs:
        if glob not in chosen.values():
            site = next(site for site in sites if fnmatchcase(site, glob))
            before = next(other for other in globs if fnmatchcase(site, other))
            raise UserError(
                f"the prior's glob {glob!r} is never reached, since {before!r} comes first; put it before that"
            )
    return {site: globs[first] for site, first in chosen.items() if first is not None}


def of_site(prior: Prior, site: str, shape: Size) -> dist.TorchDistribution:
    """What a prior says of one site; ``UserError`` that names the site if that is no distribution."""
    try:
        found = prior(site, shape)
    except UserError:
        raise
    except Exception as error:  # a user's function may fail in any way
        text = str(error).split("\n")[0]
        raise UserError(f"the prior of {site!r} failed ({type(error).__name__}: {text}); {_EXPECTED}") from error
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(f"the prior of {site!r} gave {found!r}; {_EXPECTED}")
    return found  # type: ignore[return-value]


_EXPECTED = "a prior is a pyro.distributions object, or a function (site, shape) -> one, as priors.normal(1.0) gives"


class _Always:
    """The prior that is one distribution for every site."""

    def __init__(self, distribution: Any):
        self.distribution = distribution

    def __call__(self, site: str, shape: Size) -> dist.TorchDistribution:
        return self.distribution


def _function(prior: Any) -> Prior:
    if isinstance(prior, torch.distributions.Distribution):
        return _Always(prior)
    if not callable(prior):
        raise UserError(f"{_EXPECTED}, or a dict of these by glob (None for what stays deterministic); got {prior!r}")
    return prior


def normal(*loc_scale: float, scale: float | None = None) -> Prior:
    """N(loc, scale²) on every weight (paper §3); one number is the scale, two are loc and scale."""
    loc, width = _loc_scale("normal", loc_scale, scale)
    return lambda site, shape: dist.Normal(torch.tensor(loc), torch.tensor(width))


def laplace(*loc_scale: float, scale: float | None = None) -> Prior:
    """Laplace(loc, scale) on every weight; one number is the scale, two are loc and scale."""
    loc, width = _loc_scale("laplace", loc_scale, scale)
    return lambda site, shape: dist.Laplace(torch.tensor(loc), torch.tensor(width))


def student_t(scale: float = 1.0, df: float = 3.0) -> Prior:
    """Student's t with ``df`` degrees of freedom, centred at zero, on every weight."""
    _loc_scale("student_t", (scale,))
    if not df > 0:
        raise UserError(f"student_t prior: df must be greater than 0, got {df}")
    return lambda site, shape: dist.StudentT(torch.tensor(df), torch.tensor(0.0), torch.tensor(scale))


def mixture(scale: float = 1.0, narrow: float = 0.0025, weight: float = 0.5) -> Prior:
    """π·N(0, scale²) + (1 − π)·N(0, narrow²) with π = ``weight``, the scale mixture of Bayes by Backprop (Blundell et al. 2015)."""
    for name, value in (("scale", scale), ("narrow", narrow)):
        _loc_scale(f"mixture ({name})", (value,))
    if not 0 < weight < 1:
        raise UserError(f"mixture prior: weight must be between 0 and 1, got {weight}")
    shares, scales = torch.tensor([weight, 1 - weight]), torch.tensor([scale, narrow])
    return lambda site, shape: dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(torch.zeros(2), scales))


def fan_in(scale: float = 1.0) -> Prior:
    """N(0, scale²/fan_in) on weights, by the layer's number of inputs, so that activations keep their size through a
    network; N(0, scale²) on what has one dimension, biases.
    """
    _loc_scale("fan_in", (scale,))

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        inputs = shape[1:].numel() if len(shape) > 1 else 1
        return dist.Normal(torch.tensor(0.0), torch.tensor(scale / inputs**0.5))

    return prior


def flat() -> Prior:
    """The improper uniform prior: log p(w) = 0, so that a point guide is maximum likelihood."""
    return lambda site, shape: Flat()


def from_posterior(posterior: Posterior) -> Prior:
    """N(loc, scale²) with loc and scale of a posterior, weight by weight, for continual learning: yesterday's posterior
    is today's prior. N(0, 1) on weights that it has pruned, whose scale is 0; under their mask no prior counts.

    Of a guide with correlations these are the marginals. Raises ``UserError`` for a posterior without scales.
    """
    scales = posterior.scale
    if scales is None:
        raise UserError("a point guide's posterior has no scales, so it is no prior")
    known = {
        name: (torch.where(scales[name] > 0, loc, 0.0), torch.where(scales[name] > 0, scales[name], 1.0))
        for name, loc in posterior.loc.items()
    }

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        if site not in known:
            raise UserError(f"the posterior that is to be the prior has no site {site!r}; it is of another network")
        return dist.Normal(*known[site])

    return prior


KINDS: dict[str, Callable[[float], Prior]] = {
    "normal": normal, "laplace": laplace, "student_t": student_t, "mixture": mixture, "fan_in": fan_in,
}  # fmt: skip
"""Priors by their command-line names, from one scale."""


def by_name(name: str, scale: float) -> AnyPrior:
    """A prior from its command-line name, or from the import path of ``(site, shape) -> distribution`` or a dict of globs."""
    if name in KINDS:
        return KINDS[name](scale)
    if "." not in name:
        raise unknown("prior", name, [*KINDS, "package.module.function"])
    return load_callable(name, "--prior", Mapping)


def _loc_scale(name: str, numbers: tuple[float, ...], named: float | None = None) -> tuple[float, float]:
    numbers = numbers if named is None else (*numbers, named)
    if len(numbers) > 2:
        raise UserError(f"{name} prior: expected (scale) or (loc, scale), got {len(numbers)} numbers")
    loc, scale = (0.0, *numbers) if len(numbers) == 1 else (numbers or (0.0, 1.0))
    if not scale > 0:
        raise UserError(f"{name} prior: scale must be greater than 0, got {scale}")
    return float(loc), float(scale)


class Flat(dist.TorchDistribution):
    """The improper density 1 on the real line; it cannot be sampled."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, batch_shape: Any = (), validate_args: bool | None = None):
        super().__init__(Size(batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        return Flat(Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise UserError("a flat prior cannot be sampled; use priors.normal, or a guide to draw weights from")


class SitePrior(nn.Module):
    """One site's prior: any distribution per weight that broadcasts to the site's shape.

    The distribution's tensors, also those of distributions inside it, are this module's buffers, so that ``.to()``
    moves them and the state dict holds them; a PyroSample alone does neither. Those that require a gradient are its
    parameters, the very objects where they are ``nn.Parameter``, and are learned with the guide (empirical Bayes). What
    is computed from parameters is computed at every call, by the prior function or module that did so; so is what
    depends on sites that these sample (hyperpriors), which become sites of the model.
    """

    def __init__(self, site: str, prior: Prior, shape: Size):
        super().__init__()
        self.site, self.shape = site, shape
        self._owners: dict[str, tuple[Any, str]] = {}
        self._asked: Prior | None = None
        self._constant: Any = None
        if isinstance(prior, PyroModule):
            keep_parameters_(prior)  # which would be in Pyro's global store otherwise
        found, hyperpriors = _traced(prior, site, shape)
        self.hyper_sites = tuple(hyperpriors)
        """Sites that the prior samples itself."""
        computed = [t for t in _tensors(found) if t.requires_grad and _leaf(t) is None]
        if hyperpriors or computed:
            self._ask_anew(prior, [found, *hyperpriors.values()])
        else:
            self._constant = _copied(found, self._adopt)
        try:
            fits = self().event_shape == shape
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the prior of {site!r} does not broadcast to {tuple(shape)} ({error})") from error
        if not fits:
            raise UserError(f"the prior of {site!r} must be a distribution per weight, not over vectors")

    @property
    def distribution(self) -> Any:
        """The distribution of each weight, not yet of the site's shape."""
        return self._constant if self._asked is None else _each(of_site(self._asked, self.site, self.shape))

    def learned_names(self) -> set[str]:
        """The names in this module's state dict of what training changes."""
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return names | {name for name in self.state_dict() if name.startswith("_asked.")}

    def _ask_anew(self, prior: Prior, found: list[Any]) -> None:
        leaves = _leaves(found)
        if isinstance(prior, _Always):
            raise UserError(
                f"the prior of {self.site!r} holds what was computed from a tensor that requires a gradient; give a function "
                "(site, shape) -> distribution, which computes it anew at each step, or that tensor itself"
            )
        if isinstance(prior, nn.Module):
            own, whose = set(prior.parameters()), "a parameter of that module"
        else:
            again, hyperpriors = _traced(prior, self.site, self.shape)
            own = {t for t in _leaves([again, *hyperpriors.values()]) if isinstance(t, nn.Parameter)}
            whose = "an nn.Parameter made outside it"
        if not set(leaves) <= own:
            raise UserError(
                f"the prior of {self.site!r} depends on a tensor that requires a gradient and is not {whose}"
            )
        self._asked = prior  # a module is one of this module's from now on
        if not isinstance(prior, nn.Module):
            for number, leaf in enumerate(leaves):
                self.register_parameter(f"learned_{number}", self._parameter(leaf))

    def _adopt(self, owner: Any, name: str, key: str) -> Tensor:
        value = getattr(owner, name)
        leaf = _leaf(value) if value.requires_grad else None
        if leaf is None:
            self.register_buffer(key, value.detach().clone())
        else:
            self.register_parameter(key, self._parameter(leaf))
        self._owners[key] = (owner, name)
        return getattr(self, key)

    def _parameter(self, leaf: Tensor) -> nn.Parameter:
        if not isinstance(leaf, nn.Parameter):  # which no module can own, so that an optimizer would miss it
            raise UserError(
                f"the prior of {self.site!r} has a tensor that requires a gradient; make it an nn.Parameter"
            )
        return leaf

    def _apply(self, *args: Any, **kwargs: Any) -> SitePrior:
        super()._apply(*args, **kwargs)
        for key, (owner, name) in self._owners.items():
            setattr(owner, name, getattr(self, key))
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._parameters and self._asked is not None:
            raise UserError(  # since the function would go on with the parameters of the original
                f"the prior of {self.site!r} is a function of nn.Parameters, which a copy would share; write it as an "
                "nn.Module whose forward takes site and shape"
            )
        return self.__dict__

    def forward(self) -> dist.TorchDistribution:
        return self.distribution.expand(self.shape).to_event(len(self.shape))


def _each(distribution: Any) -> Any:
    """The distribution per weight inside any number of ``.to_event()``."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


class OneSite(Messenger):
    """Within this context, sample statements of one name are one site: the first is made, the others get its value.

    So a hyperprior may be stated by the priors of several sites. ``names`` are those it acts on, None for all. Raises
    ``UserError`` where the distributions of one name differ and ``check`` is on.
    """

    def __init__(self, names: Iterable[str] | None = None, check: bool = False):
        super().__init__()
        self._names, self._check = None if names is None else set(names), check
        self._met: dict[str, tuple[Any, Any]] = {}

    def __exit__(self, *exception: Any) -> None:
        self._met.clear()
        super().__exit__(*exception)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._met:
            fn, value = self._met[msg["name"]]
            if self._check and not _same(fn, msg["fn"]):
                raise UserError(f"two priors sample {msg['name']!r} from different distributions; give them two names")
            msg["value"], msg["done"], msg["stop"] = value, True, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._names is None or msg["name"] in self._names:
            self._met[msg["name"]] = msg["fn"], msg["value"]


def _same(one: Any, other: Any) -> bool:
    tensors = zip_longest(_tensors(one), _tensors(other))
    return type(one) is type(other) and all(a is b or (a is not None and torch.equal(a, b)) for a, b in tensors)


def _traced(prior: Prior, site: str, shape: Size) -> tuple[Any, dict[str, Any]]:
    """The distribution per weight that a prior says, and of each site that it samples itself the distribution.

    Raises ``UserError`` for other statements of Pyro.
    """
    trace = poutine.trace(lambda: of_site(prior, site, shape)).get_trace()
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample":
            if node["is_observed"]:
                raise UserError(f"the prior of {site!r} observes {name!r}, which only a likelihood can")
            found[name] = node["fn"]
        if node["type"] == "param" and not isinstance(prior, nn.Module):
            raise UserError(
                f"the prior of {site!r} has pyro.param({name!r}) inside; use an nn.Parameter, which the model then owns"
            )
    return _each(trace.nodes["_RETURN"]["value"]), found


def _copied(original: Any, tensor: Callable[[Any, str, str], Tensor], path: str = "") -> Any:
    """A copy of a distribution or transform, and of those inside it, with ``tensor(owner, name, key)`` for each tensor."""
    if isinstance(original, torch.distributions.transforms._InverseTransform):
        return _copied(original.inv, tensor, path).inv
    owner = copy.copy(original)
    for name, value in list(vars(owner).items()):
        key = f"{path}_{name}" if path else name
        if name == "_inv":  # a transform's inverse, which holds that transform: the copy makes its own when asked
            setattr(owner, name, None)
        elif isinstance(value, Tensor):
            setattr(owner, name, tensor(owner, name, key))
        elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
            setattr(owner, name, _copied(value, tensor, key))
        elif isinstance(value, list) and all(isinstance(v, torch.distributions.Transform) for v in value):
            setattr(owner, name, [_copied(v, tensor, f"{key}_{place}") for place, v in enumerate(value)])
    return owner


def detached(distribution: Any) -> Any:
    """A copy of a distribution whose tensors require no gradient."""
    return _copied(distribution, lambda owner, name, key: getattr(owner, name).detach())


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors of a distribution or transform, and of those inside it."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        if id(value) not in seen:  # a transform and its inverse hold each other
            seen.add(id(value))
            for inner in vars(value).values():
                yield from _tensors(inner, seen)
    elif isinstance(value, list):
        for inner in value:
            yield from _tensors(inner, seen)


def _leaf(value: Tensor) -> Tensor | None:
    """The leaf that ``value`` is or is an expansion of, as distributions make of their arguments; None if computed."""
    if value.is_leaf:
        return value
    leaf = value._base
    if leaf is None or not leaf.is_leaf or leaf.storage_offset() != value.storage_offset():
        return None
    try:
        return leaf if leaf.expand(value.shape).stride() == value.stride() else None
    except RuntimeError:  # a view of another kind
        return None


def _leaves(distributions: list[Any]) -> list[Tensor]:
    """The leaves that the tensors of distributions are computed from and that require a gradient."""
    found = {id(t): t for t in _tensors(distributions) if t.requires_grad and t.is_leaf}
    nodes: list[Any] = [t.grad_fn for t in _tensors(distributions) if t.grad_fn is not None]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())
