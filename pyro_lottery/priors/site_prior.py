"""The prior of one site, as a module of the network."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Size, Tensor, nn

from pyro_lottery.distributions import base
from pyro_lottery.errors import UserError
from pyro_lottery.priors.by_site import Always, Prior, of_site
from pyro_lottery.priors.hyperpriors import traced
from pyro_lottery.priors.own_parameters import keep_parameters_
from pyro_lottery.priors.tensors import copied, leaf_of, leaves_of, tensors_of


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
        found, hyperpriors = traced(prior, site, shape)
        self.hyper_sites = tuple(hyperpriors)
        """The sites that the prior samples itself (hyperpriors)."""
        computed = [t for t in tensors_of(found) if t.requires_grad and leaf_of(t) is None]
        if hyperpriors or computed:
            self._ask_anew(prior, [found, *hyperpriors.values()])
        else:
            self._constant = copied(found, self._adopt)
        try:
            fits = self().event_shape == shape
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the prior of {site!r} does not broadcast to {tuple(shape)} ({error}); give numbers, or tensors of this shape"
            ) from error
        if not fits:
            raise UserError(f"the prior of {site!r} must be a distribution per weight, not over vectors")

    @property
    def distribution(self) -> Any:
        """The distribution of each weight, which broadcasts to the site's shape."""
        return self._constant if self._asked is None else base(of_site(self._asked, self.site, self.shape))

    def learned_names(self) -> set[str]:
        """The names, in this module's state dict, of the tensors that training changes."""
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return names | {name for name in self.state_dict() if name.startswith("_asked.")}

    def _ask_anew(self, prior: Prior, found: list[Any]) -> None:
        leaves = leaves_of(found)
        if isinstance(prior, Always):
            raise UserError(
                f"the prior of {self.site!r} has a tensor computed from one that requires a gradient; use a function "
                "(site, shape) -> distribution, which computes it at each step, or the original tensor"
            )
        if isinstance(prior, nn.Module):
            own, whose = set(prior.parameters()), "a parameter of the prior module"
        else:
            again, hyperpriors = traced(prior, self.site, self.shape)
            own = {t for t in leaves_of([again, *hyperpriors.values()]) if isinstance(t, nn.Parameter)}
            whose = "an nn.Parameter created outside the prior function"
        if not set(leaves) <= own:
            raise UserError(
                f"the prior of {self.site!r} depends on a tensor that requires a gradient; such a tensor must be {whose}"
            )
        self._asked = prior  # a module becomes a submodule here
        if not isinstance(prior, nn.Module):
            for number, leaf in enumerate(leaves):
                self.register_parameter(f"learned_{number}", self._parameter(leaf))

    def _adopt(self, owner: Any, name: str, key: str) -> Tensor:
        value = getattr(owner, name)
        leaf = leaf_of(value) if value.requires_grad else None
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
