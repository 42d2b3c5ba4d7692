"""Priors on weights: a distribution per weight, a function ``(site, shape) -> distribution``, or a dict of these by glob.

In a dict, the first glob that matches a site's name applies, and None keeps its parameters deterministic:
``{"layer4.*": normal(1.0), "*": None}``.
"""

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

# Pyro's guides map every site's support to the real line. Torch registers no such map for mixtures, so use that of the
# components.
for _registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    _registry.register(
        torch.distributions.constraints.MixtureSameFamilyConstraint,
        lambda constraint, registry=_registry: registry(constraint.base_constraint),
    )

Prior = Callable[[str, Size], dist.TorchDistribution]
AnyPrior = Prior | dist.TorchDistribution | Mapping[str, Prior | dist.TorchDistribution | None]


def of_sites(prior: AnyPrior, sites: Iterable[str]) -> dict[str, Prior | None]:
    """Convert a prior of any kind to one function ``(site, shape) -> distribution`` per site, or None if deterministic.

    In a dict, the first glob that matches a site's name applies: ``{"*.conv1.weight": laplace(0.1), "*": normal(1.0)}``,
    or ``{"layer4.*": normal(1.0), "*": None}``. Raises ``UserError`` if a glob matches no site or is never reached, or if
    no glob matches a site.
    """
    if not isinstance(prior, Mapping):
        return dict.fromkeys(sites, _function(prior))
    sites, globs = list(sites), {glob: None if value is None else _function(value) for glob, value in prior.items()}
    for glob in globs:
        if not any(fnmatchcase(site, glob) for site in sites):
            near = difflib.get_close_matches(glob.replace("*", ""), sites, n=3, cutoff=0.3) or sites[:3]
            raise UserError(f"the prior's glob {glob!r} matches no site; similar names: {', '.join(near)}")
    chosen = {site: next((glob for glob in globs if fnmatchcase(site, glob)), None) for site in sites}
    for site, first in chosen.items():
        if first is None:
            raise UserError(f"no glob of the prior matches site {site!r}; add '*' for all other sites")
    for glob in globs:
        if glob not in chosen.values():
            site = next(site for site in sites if fnmatchcase(site, glob))
            before = next(other for other in globs if fnmatchcase(site, other))
            raise UserError(
                f"the prior's glob {glob!r} is never used, since {before!r} comes first; put {glob!r} before it"
            )
    return {site: globs[first] for site, first in chosen.items() if first is not None}


def of_site(prior: Prior, site: str, shape: Size) -> dist.TorchDistribution:
    """The distribution that ``prior`` gives for one site; raises ``UserError`` with the site's name if it fails or gives none."""
    try:
        found = prior(site, shape)
    except UserError:
        raise
    except Exception as error:  # a user's function may fail in any way
        text = str(error).split("\n")[0]
        raise UserError(f"the prior of {site!r} failed ({type(error).__name__}: {text}); {_EXPECTED}") from error
    if not isinstance(found, TorchDistributionMixin):
        raise UserError(f"the prior of {site!r} returned {found!r}; {_EXPECTED}")
    return found  # type: ignore[return-value]


_EXPECTED = "a prior must be a pyro.distributions object, or a function (site, shape) -> distribution, such as priors.normal(1.0)"


class _Always:
    """A prior that is the same distribution for every site."""

    def __init__(self, distribution: Any):
        self.distribution = distribution

    def __call__(self, site: str, shape: Size) -> dist.TorchDistribution:
        return self.distribution


def _function(prior: Any) -> Prior:
    if isinstance(prior, torch.distributions.Distribution):
        return _Always(prior)
    if not callable(prior):
        raise UserError(f"{_EXPECTED}, or a dict of these by glob (None to stay deterministic); got {prior!r}")
    return prior


def normal(*loc_scale: float, scale: float | None = None) -> Prior:
    """N(loc, scale²) on every weight (paper §3); one number is the scale, two numbers are loc and scale.

    Raises ``UserError`` if scale is not greater than 0, or if there are more than two numbers.
    """
    loc, width = _loc_scale("normal", loc_scale, scale)
    return lambda site, shape: dist.Normal(torch.tensor(loc), torch.tensor(width))


def laplace(*loc_scale: float, scale: float | None = None) -> Prior:
    """Laplace(loc, scale) on every weight; one number is the scale, two numbers are loc and scale.

    Raises ``UserError`` if scale is not greater than 0, or if there are more than two numbers.
    """
    loc, width = _loc_scale("laplace", loc_scale, scale)
    return lambda site, shape: dist.Laplace(torch.tensor(loc), torch.tensor(width))


def student_t(scale: float = 1.0, df: float = 3.0) -> Prior:
    """Student's t distribution with ``df`` degrees of freedom, centred at 0, on every weight.

    Raises ``UserError`` if ``scale`` or ``df`` is not greater than 0.
    """
    _loc_scale("student_t", (scale,))
    if not df > 0:
        raise UserError(f"student_t prior: df must be greater than 0, got {df}")
    return lambda site, shape: dist.StudentT(torch.tensor(df), torch.tensor(0.0), torch.tensor(scale))


def mixture(scale: float = 1.0, narrow: float = 0.0025, weight: float = 0.5) -> Prior:
    """π·N(0, scale²) + (1 − π)·N(0, narrow²) on every weight, with π = ``weight``.

    This is the scale mixture of Bayes by Backprop (Blundell et al. 2015). Raises ``UserError`` if ``scale`` or ``narrow``
    is not greater than 0, or if ``weight`` is not between 0 and 1.
    """
    for name, value in (("scale", scale), ("narrow", narrow)):
        _loc_scale(f"mixture ({name})", (value,))
    if not 0 < weight < 1:
        raise UserError(f"mixture prior: weight must be between 0 and 1, got {weight}")
    shares, scales = torch.tensor([weight, 1 - weight]), torch.tensor([scale, narrow])
    return lambda site, shape: dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(torch.zeros(2), scales))


def fan_in(scale: float = 1.0) -> Prior:
    """N(0, scale²/fan_in) on weights, with the layer's number of inputs fan_in, and N(0, scale²) on biases.

    It keeps the size of activations similar across layers. A parameter with one dimension counts as a bias. Raises
    ``UserError`` if ``scale`` is not greater than 0.
    """
    _loc_scale("fan_in", (scale,))

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        inputs = shape[1:].numel() if len(shape) > 1 else 1
        return dist.Normal(torch.tensor(0.0), torch.tensor(scale / inputs**0.5))

    return prior


def flat() -> Prior:
    """The improper uniform prior, log p(w) = 0, with which a point guide is maximum likelihood."""
    return lambda site, shape: Flat()


def from_posterior(posterior: Posterior) -> Prior:
    """N(loc, scale²) with the loc and scale of ``posterior`` for each weight, for continual learning.

    Pruned weights, whose scale is 0, get N(0, 1); under their mask, the prior has no effect. For a guide with
    correlations, the result has the marginals of the posterior. Raises ``UserError`` if the posterior has no scales.
    """
    scales = posterior.scale
    if scales is None:
        raise UserError("a point guide's posterior has no scales, so it cannot be a prior; use a Bayesian guide")
    known = {
        name: (torch.where(scales[name] > 0, loc, 0.0), torch.where(scales[name] > 0, scales[name], 1.0))
        for name, loc in posterior.loc.items()
    }

    def prior(site: str, shape: Size) -> dist.TorchDistribution:
        if site not in known:
            raise UserError(f"the posterior used as the prior has no site {site!r}; it belongs to another network")
        return dist.Normal(*known[site])

    return prior


KINDS: dict[str, Callable[[float], Prior]] = {
    "normal": normal, "laplace": laplace, "student_t": student_t, "mixture": mixture, "fan_in": fan_in,
}  # fmt: skip
"""Priors by their command-line names; each takes a scale."""


def by_name(name: str, scale: float) -> AnyPrior:
    """A prior from its command-line name and ``scale``, or from an import path of a function or of a dict of globs.

    Raises ``UserError`` if the name is unknown, or if the import fails.
    """
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
    """The improper density 1 on the real line, which cannot be sampled."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, batch_shape: Any = (), validate_args: bool | None = None):
        super().__init__(Size(batch_shape), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flat:
        return Flat(Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """0, with the shape of ``value``."""
        return value.new_zeros(value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Raise ``UserError`` for every shape, since an improper density cannot be sampled."""
        raise UserError("a flat prior cannot be sampled; use priors.normal, or sample a guide")


class SitePrior(nn.Module):
    """The prior of one site, as a module: a distribution per weight that broadcasts to the site's shape.

    The distribution's tensors, including those of nested distributions, are this module's buffers, so that ``.to()``
    moves them and the state dict holds them; a PyroSample alone does neither. An ``nn.Parameter`` of the distribution
    is registered as a parameter and learned with the guide (empirical Bayes). If the distribution is computed from
    parameters, or from sites that the prior samples itself (hyperpriors, which become sites of the model), the prior
    function or module is called again at each step. Raises ``UserError`` if the distribution does not broadcast to the
    site's shape, is not one per weight, or depends on parameters that no module owns.
    """

    def __init__(self, site: str, prior: Prior, shape: Size):
        super().__init__()
        self.site, self.shape = site, shape
        self._owners: dict[str, tuple[Any, str]] = {}
        self._asked: Prior | None = None
        self._constant: Any = None
        if isinstance(prior, PyroModule):
            keep_parameters_(prior)  # otherwise they would be in Pyro's global store
        found, hyperpriors = _traced(prior, site, shape)
        self.hyper_sites = tuple(hyperpriors)
        """The sites that the prior samples itself (hyperpriors)."""
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
        """The distribution of each weight, which broadcasts to the site's shape."""
        return self._constant if self._asked is None else _each(of_site(self._asked, self.site, self.shape))

    def learned_names(self) -> set[str]:
        """The names, in this module's state dict, of the tensors that training changes."""
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return names | {name for name in self.state_dict() if name.startswith("_asked.")}

    def _ask_anew(self, prior: Prior, found: list[Any]) -> None:
        leaves = _leaves(found)
        if isinstance(prior, _Always):
            raise UserError(
                f"the prior of {self.site!r} has a tensor computed from one that requires a gradient; use a function "
                "(site, shape) -> distribution, which computes it at each step, or the original tensor"
            )
        if isinstance(prior, nn.Module):
            own, whose = set(prior.parameters()), "a parameter of the prior module"
        else:
            again, hyperpriors = _traced(prior, self.site, self.shape)
            own = {t for t in _leaves([again, *hyperpriors.values()]) if isinstance(t, nn.Parameter)}
            whose = "an nn.Parameter created outside the prior function"
        if not set(leaves) <= own:
            raise UserError(
                f"the prior of {self.site!r} depends on a tensor that requires a gradient and is not {whose}"
            )
        self._asked = prior  # a module becomes a submodule here
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
        if not isinstance(leaf, nn.Parameter):  # no module can own it, so an optimizer would miss it
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
            raise UserError(  # a copied function would keep using the original's parameters
                f"the prior of {self.site!r} is a function of nn.Parameters, so it cannot be copied; write it as an "
                "nn.Module whose forward takes site and shape"
            )
        return self.__dict__

    def forward(self) -> dist.TorchDistribution:
        return self.distribution.expand(self.shape).to_event(len(self.shape))


def _each(distribution: Any) -> Any:
    """The distribution per weight, without any enclosing ``.to_event()``."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


class OneSite(Messenger):
    """Merges sample statements with the same name within this context: the first is sampled, the others get its value.

    The priors of several sites can therefore sample the same hyperprior. It acts on ``names``, or on all names if None.
    With ``check``, raises ``UserError`` if the distributions of one name differ.
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
                raise UserError(f"two priors sample {msg['name']!r} from different distributions; use two names")
            msg["value"], msg["done"], msg["stop"] = value, True, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._names is None or msg["name"] in self._names:
            self._met[msg["name"]] = msg["fn"], msg["value"]


def _same(one: Any, other: Any) -> bool:
    tensors = zip_longest(_tensors(one), _tensors(other))
    return type(one) is type(other) and all(a is b or (a is not None and torch.equal(a, b)) for a, b in tensors)


def _traced(prior: Prior, site: str, shape: Size) -> tuple[Any, dict[str, Any]]:
    """The distribution per weight that a prior gives, and the distribution of each site that it samples itself.

    Raises ``UserError`` if the prior observes a site or calls ``pyro.param``.
    """
    trace = poutine.trace(lambda: of_site(prior, site, shape)).get_trace()
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "sample":
            if node["is_observed"]:
                raise UserError(f"the prior of {site!r} observes {name!r}; only a likelihood may observe")
            found[name] = node["fn"]
        if node["type"] == "param" and not isinstance(prior, nn.Module):
            raise UserError(
                f"the prior of {site!r} calls pyro.param({name!r}); use an nn.Parameter, which the model can own"
            )
    return _each(trace.nodes["_RETURN"]["value"]), found


def _copied(original: Any, tensor: Callable[[Any, str, str], Tensor], path: str = "") -> Any:
    """A deep copy of a distribution or transform in which ``tensor(owner, name, key)`` replaces each tensor."""
    if isinstance(original, torch.distributions.transforms._InverseTransform):
        return _copied(original.inv, tensor, path).inv
    owner = copy.copy(original)
    for name, value in list(vars(owner).items()):
        key = f"{path}_{name}" if path else name
        if name == "_inv":  # the cached inverse refers to the original; the copy creates its own on demand
            setattr(owner, name, None)
        elif isinstance(value, Tensor):
            setattr(owner, name, tensor(owner, name, key))
        elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
            setattr(owner, name, _copied(value, tensor, key))
        elif isinstance(value, list) and all(isinstance(v, torch.distributions.Transform) for v in value):
            setattr(owner, name, [_copied(v, tensor, f"{key}_{place}") for place, v in enumerate(value)])
    return owner


def detached(distribution: Any) -> Any:
    """A copy of a distribution whose tensors do not require gradients."""
    return _copied(distribution, lambda owner, name, key: getattr(owner, name).detach())


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors of a distribution or transform, including nested ones."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, torch.distributions.Distribution | torch.distributions.Transform):
        if id(value) not in seen:  # a transform and its inverse refer to each other
            seen.add(id(value))
            for inner in vars(value).values():
                yield from _tensors(inner, seen)
    elif isinstance(value, list):
        for inner in value:
            yield from _tensors(inner, seen)


def _leaf(value: Tensor) -> Tensor | None:
    """The autograd leaf that ``value`` is or expands, as distributions expand their arguments; None if it was computed."""
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
    """The autograd leaves with gradients from which the tensors of the distributions are computed."""
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
