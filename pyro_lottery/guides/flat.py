"""The base class of this package's guides: one independent site per weight tensor, in flat parameters over all sites."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from torch import Size, Tensor, nn

from pyro_lottery.distributions import spread
from pyro_lottery.errors import UserError
from pyro_lottery.guides.base import Tempered, model_of
from pyro_lottery.guides.family import Family, family
from pyro_lottery.guides.places import Place, Select, check_unmasked, continuous_sites
from pyro_lottery.guides.quantiles import normal_quantiles
from pyro_lottery.handlers import active_mask
from pyro_lottery.kernels import Layout
from pyro_lottery.kernels.layout import flatten
from pyro_lottery.types import Posterior


class FlatGuide(Tempered, Family):
    """A guide with one independent site per weight tensor, whose parameters are flat vectors over all of them.

    The parameters are complete from the start: the model is traced without data, or with ``prototype_args``. The state
    dict holds one tensor per site and parameter, shaped like the site: ``loc.<site>``.

    A site inside plates has parameters over the whole plates, and a subsample uses its part of them. ``create_plates`` is
    Pyro's: a function of the model's arguments that returns plates to use instead of new ones. A site over less than the
    real line (positive numbers, a simplex) has the parameters of its image under ``biject_to(support)``, so that they are
    unconstrained. Such a site cannot be pruned, and a network's own weights must be over all real numbers.
    """

    flat: ClassVar[tuple[str, ...]] = ("loc",)
    """Names of the flat parameters."""
    _found: tuple[int, Layout, list[Tensor]] | None = None
    """Within :meth:`drawn_from`: its thread, and what :meth:`under_masks` returns."""
    draws_sites_apart = True
    """No site's distribution depends on another's value, so that a closed-form KL is a site's own."""

    def __init__(self, model: Callable[..., Any], *prototype_args: Any, create_plates: Any = None):
        super().__init__(model, create_plates=create_plates)
        sites = continuous_sites(model, *prototype_args)
        self.places = {name: Place.of(site) for name, site in sites.items()}
        values = {name: place.loc_of(sites[name]["value"]) for name, place in self.places.items()}
        self.shapes: dict[str, Size] = {name: value.shape for name, value in values.items()}
        """Shapes of each site's parameters."""
        self._hyper_sites = frozenset(getattr(model_of(self), "hyper_sites", ()))
        self._unprunable = {name: why for name, place in self.places.items() if (why := place.unprunable)}
        self._prototype_frames = {frame.name: frame for place in self.places.values() for frame in place.frames}
        self.layout = Layout(list(self.shapes.values()))
        """Layout of the parameters: all weights, or within :func:`compressed` those that the masks keep."""
        self._masked = self.layout  # under the last masks, while the guide is not compressed
        self.loc = nn.Parameter(torch.cat([flatten(value) for value in values.values()]).clone())

    def sites(self) -> dict[str, Place]:
        return self.places

    def locs(self) -> dict[str, Tensor]:
        return self.unpack(self.loc.data)

    @torch.no_grad()
    def set_(self, posterior: Posterior) -> None:
        if self.layout.index is not None:
            raise UserError("a guide cannot be set while it trains under a mask; set it before or after the training")
        for name, loc in self.locs().items():
            loc.copy_(posterior.loc[name])

    @torch.no_grad()
    def set_at_(self, where: Mapping[str, Tensor], posterior: Posterior) -> None:
        before = [getattr(self, name).detach().clone() for name in self.flat]
        self.set_(posterior)
        no = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        chosen = torch.cat([flatten(site) for site in (no | dict(where)).values()]).to(self.loc.device)
        for name, old in zip(self.flat, before, strict=True):
            parameter = getattr(self, name)
            parameter.copy_(torch.where(chosen, parameter, old))

    def relaid(
        self, parameter: Tensor, values: Tensor, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
    ) -> Tensor:
        if not any(parameter is getattr(self, name) for name in self.flat):
            return values
        old, new = (
            Layout(self.layout.shapes, [masks.get(name) for name in self.shapes], values.device)
            for masks in (before, after)
        )
        return new.keep(old.scatter(values)).clone()

    def loc_parameters(self) -> list[Tensor]:
        return [self.loc]

    def per_site(self) -> list[tuple[str, Tensor]]:
        return [item for name in self.flat for item in self.unpack(getattr(self, name).data).items()]

    def drawn_shapes(self) -> dict[str, Size]:
        return {name: place.shape for name, place in self.places.items()}

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Every site's view of a vector laid out like the parameters; zeros where a compressed guide keeps nothing."""
        return dict(zip(self.shapes, self.layout.views(self.layout.scatter(flat)), strict=True))

    def under_masks(self) -> tuple[Layout, list[Tensor]]:
        """The layout that the enclosing ``sparsify`` leaves, and its parameters [weights in the layout]."""
        masks = tuple(active_mask(name, shape, self.loc.device) for name, shape in self.shapes.items())
        if self._unprunable:
            check_unmasked(dict(zip(self.shapes, masks, strict=True)), self._unprunable)
        if self._found is not None:
            thread, layout, kept = self._found
            if thread == threading.get_ident() and all(a is b for a, b in zip(masks, layout.masks, strict=True)):
                return layout, kept
        parameters = [getattr(self, name) for name in self.flat]
        if _same(masks, self.layout.masks):
            self.layout.masks = masks  # so that the next comparison is of objects, and a GPU is not waited for
            return self.layout, parameters
        if self.layout.index is not None:
            raise UserError(
                "this guide trains under another mask and has only its weights; call it under that mask, or after the training"
            )
        if not _same(masks, self._masked.masks):
            with torch.inference_mode(False):  # it may be used outside
                self._masked = Layout(self.layout.shapes, masks, self.loc.device)
        self._masked.masks = masks
        return self._masked, [self._masked.keep(p) for p in parameters]

    def draw(self, distribution: Callable[[int, Select], Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site inside its plates; returns the values by site.

        ``distribution(number, select)`` returns the distribution of site ``number``, per parameter; ``select`` takes the
        subsample's part of a tensor of parameters.
        """
        # A user's plates are made even if no site is in them: they say which part of the data the model sees.
        plates = self._create_plates(*args, **kwargs) if self._prototype_frames or self.create_plates else {}
        values = {}
        with poutine.scale(scale=self._temperature):
            for number, (name, place) in enumerate(self.places.items()):
                with ExitStack() as stack:
                    select = place.enter(stack, plates, self.create_plates is not None)
                    infer: Any = {"is_weight": name not in self._hyper_sites}
                    values[name] = pyro.sample(name, place.distribution(distribution(number, select)), infer=infer)
        return values

    def draw_point(self, *args: Any, factors: Tensor | None = None) -> dict[str, Tensor]:
        """Set every site to its loc, or to loc times ``factors`` [weights]; returns the values by site, with the sites' shapes."""
        layout, (loc, *_) = self.under_masks()
        values = spread(loc if factors is None else loc * layout.keep(factors), layout)
        return self.draw(lambda number, select: values[number] if select is None else select(values[number]), *args)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of every site, shaped like its parameters; 0 where the enclosing ``sparsify`` prunes."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles [n, *shape] of every weight for n numbers between 0 and 1; 0 where ``sparsify`` prunes."""
        layout, (loc, *log_scale) = self.under_masks()
        locs = layout.views(layout.scatter(loc))
        scales = layout.views(layout.scatter(log_scale[0].exp())) if log_scale else [None] * len(locs)
        sites = zip(self.places.items(), locs, scales, strict=True)
        return {name: normal_quantiles(place, at, scale, quantiles) for (name, place), at, scale in sites}

    @contextmanager
    def compressed(self) -> Iterator[None]:
        dense = self.compress_()
        try:
            yield
        finally:
            self.expand_(dense)

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        with torch.no_grad():
            layout, kept = self.under_masks()
        before, self._found = self._found, (threading.get_ident(), layout, kept)
        try:
            yield
        finally:
            self._found = before

    def compress_(self) -> tuple[Layout, dict[str, nn.Parameter]]:
        """Keep only the weights that the enclosing ``sparsify`` leaves as parameters; returns what :meth:`expand_` needs."""
        layout, kept = self.under_masks()
        before = self.layout, {name: getattr(self, name) for name in self.flat}
        if layout is not self.layout:
            self.layout = layout
            for name, values in zip(self.flat, kept, strict=True):
                dense = before[1][name]
                self._set(name, nn.Parameter(values.detach().clone(), requires_grad=dense.requires_grad))
        return before

    @torch.no_grad()
    def expand_(self, before: tuple[Layout, dict[str, nn.Parameter]]) -> None:
        """Undo :meth:`compress_`: trained values go where they belong; the loc of every pruned weight becomes 0."""
        for name, parameter in before[1].items():
            kept = getattr(self, name)
            if kept is not parameter:
                if name == "loc":
                    parameter.zero_()
                if self.layout.index is None:
                    parameter.copy_(kept)
                else:
                    parameter.index_copy_(0, self.layout.index, kept)
                parameter.grad = None
                self._set(name, parameter)
        self.layout = before[0]

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        # Not by setattr: Pyro would delete a parameter of this name from its global store, perhaps a user's own "loc".
        self._parameters[name] = parameter

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self.flat:
            parameter = getattr(self, name)
            for site, value in self.unpack(parameter if keep_vars else parameter.detach()).items():
                destination[f"{prefix}{name}.{site}"] = value

    @torch.no_grad()
    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        errors: list[str],
    ) -> None:  # fmt: skip
        expected = {f"{prefix}{name}.{site}": shape for name in self.flat for site, shape in self.shapes.items()}
        absent = [key for key in expected if key not in state]
        missing += absent
        unexpected += [key for key in state if key.startswith(prefix) and key not in expected]
        wrong = [key for key, shape in expected.items() if key in state and state[key].shape != shape]
        errors += [f"{key} is {tuple(state[key].shape)}, but the site is {tuple(expected[key])}" for key in wrong]
        if absent or wrong:
            return
        for name in self.flat:
            values = [flatten(state[f"{prefix}{name}.{site}"]) for site in self.shapes]
            parameter = getattr(self, name)
            parameter.copy_(self.layout.keep(torch.cat(values).to(parameter.device)))


family.register(FlatGuide, lambda guide: guide)


def _same(masks: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> bool:
    return all(
        a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))
        for a, b in zip(masks, others, strict=True)
    )
