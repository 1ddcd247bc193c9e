"""The contract that every method keeps: one call, Captum's conventions, and nothing left behind."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from attrib_zoo.backbone import layers as layer_rules
from attrib_zoo.backbone.capture import forward_args, frozen, unwrap
from attrib_zoo.backbone.layers.extents import Extents
from attrib_zoo.backbone.layers.gridcheck import check_grids
from attrib_zoo.backbone.layers.known import known, situation
from attrib_zoo.backbone.layers.resolve import Tap
from attrib_zoo.backbone.targets import TargetQuery
from attrib_zoo.errors import InputError, LayerError, ModelChangedError, OptionError, check_choice, html_table
from attrib_zoo.masking import mean_filter, min_max, placed, positive_scale, rank_scale, upsample

if TYPE_CHECKING:  # Captum ships no type information; this is what we use of its base classes

    class _CaptumAttribution:
        forward_func: Callable[..., Any]

        def __init__(self, forward_func: Callable[..., Any]) -> None: ...

    class GradientAttribution:
        """Mark of the methods that differentiate the model."""

    class PerturbationAttribution:
        """Mark of the methods that change the inputs."""

else:
    from captum.attr import Attribution as _CaptumAttribution
    from captum.attr import GradientAttribution, PerturbationAttribution  # noqa: F401  # for the methods

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")

SCALES: dict[str, Callable[[Tensor], Tensor]] = {"min-max": min_max, "rank": rank_scale, "positive": positive_scale}
"""What can be done to the values of maps ``(..., h, w)``."""
"""What ``scale`` may be, beside ``None``."""


def _transparent(function: _F) -> _F:
    """A wrapper that does nothing but carry ``__wrapped__``, through which Captum's NoiseTunnel calls."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # same signature by construction


def _eager(function: _F) -> _F:
    """A method that runs as it is also where the code around it is compiled: its hooks would not fire otherwise."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return torch._dynamo.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # same signature by construction


class Attribution(_CaptumAttribution, ABC):
    """Base of all methods: an attribution map for each image, called as Captum's methods are.

    Subclasses implement one hook, :meth:`compute_maps`; everything else (targets, tuples, eval mode, gradient mode,
    layers, smoothing, scaling, upsampling, clean-up) is done here once.

    Args:
        model: a classifier that takes ``(N, C, H, W)`` images, standardised as it was trained with, and returns
            ``(N, K)`` logits (or one logit per image, whose sign decides between the classes 0 and 1). It is never
            changed, and other threads may use it in the meantime. DataParallel, DistributedDataParallel and
            ``torch.compile`` wrappers are removed.
        layers: which layers to read: ``None`` for the method's default on this kind of model, a dotted name, a
            module of the model, a negative index into the model's stages or blocks (``-1`` the last), a pair
            ``(layer, Grid(...))`` where the layout must be given, or a list of these.
        upsample: ``True`` returns maps in the shape of the inputs; ``False`` returns ``(N, 1, h, w)`` at the layer's
            resolution.
        smooth: an odd number k: each cell of the map, at the layer's resolution, becomes the mean of the k x k cells
            around it (at the borders, of those that exist). With several layers, each map is smoothed before they are
            combined. ``None``: no smoothing. Methods whose map has the images' resolution have no such option.
        scale: how the values of the map are then scaled, before it is enlarged: ``"min-max"`` scales them to
            [0, 1]; ``"rank"`` replaces them by their ranks, also in [0, 1], ties by their mean rank;
            ``"positive"`` sets negative values to zero and divides by the maximum, so that places without evidence for
            the target stay dark; ``None`` keeps the method's own scale: min-max for trained methods, that of the
            formula for others.

    Attributes:
        family: the kind of method, for tables.
        paper: the source.
        models: kinds of model that it is defined for, ``"cnn"`` and/or ``"vit"``.
        cost: passes through the model for each image; F is a forward pass, B a backward pass.
        class_agnostic: the map does not depend on the target.
        own_scale: what ``scale=None`` means, one of :data:`SCALES`; ``None`` leaves maps as they are.
        needs_fit: the method must be trained before use.
        default_layers: ``(rule, count)`` used when ``layers=None``; see ``backbone.layers.resolve``. ``None``:
            the method reads no layers.
        reads_attended: the method may read what the class token takes from each patch; see ``backbone.grid.Tap``.
        cheap_options: options that make a slow method fast, at the price of a coarse map; the contract suite builds
            explainers with them.
    """

    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    models: ClassVar[tuple[str, ...]] = ("cnn", "vit")
    cost: ClassVar[str] = ""
    class_agnostic: ClassVar[bool] = False
    own_scale: ClassVar[str | None] = None
    needs_fit: ClassVar[bool] = False
    default_layers: ClassVar[tuple[str, int] | None] = ("outputs", 1)
    reads_attended: ClassVar[bool] = False
    multiplies_by_inputs: ClassVar[bool] = False
    cheap_options: ClassVar[Mapping[str, Any]] = {}
    __signature__: ClassVar[inspect.Signature]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Say what takes the place of an argument of Captum's layer methods."""
        if "device_ids" in kwargs:
            raise OptionError(
                f"{cls.__name__}: device_ids must be left out: of a DataParallel model the module inside is explained, "
                "on the device of its weights"
            )
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        layers: Any = None,
        *,
        upsample: bool = True,
        smooth: int | None = None,
        scale: str | None = None,
    ) -> None:
        unwrap(model)  # fails early for what cannot be explained
        super().__init__(model)
        self.layers = layers
        self.upsample = bool(upsample)
        self.smooth = check_smooth(smooth)
        self.scale: str | None = None if scale is None else check_choice("scale", scale, tuple(SCALES))
        self._resolved: dict[Hashable, tuple[object, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__new__" not in cls.__dict__:  # else Python 3.10 shows the one above in place of an inherited __init__
            _, *parameters = inspect.signature(cls.__init__).parameters.values()
            cls.__signature__ = inspect.Signature(parameters)
        for name in ("attribute", "attribute_many"):
            if name in cls.__dict__:
                raise TypeError(f"{cls.__name__}: {name} is final; fill the hook compute_maps instead")

    # ------------------------------------------------------------------ the hook

    @abstractmethod
    def compute_maps(
        self, inputs: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> Tensor | Sequence[Tensor]:
        """The maps ``(N, T, h, w)`` of T targets per image; the one thing that a method must define.

        Called with the model in eval mode, gradients off, and inputs that carry no graph. Resolve the targets on the
        clean outputs (``query.resolve(outputs)``), which the method computes anyway. Methods that read several layers
        return a list of the maps of each layer, in layer order, which :meth:`fuse` combines.
        """
        raise NotImplementedError

    def fuse(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Combine the maps of several layers, given in layer order, into one: the mean of the upsampled maps.

        Args:
            maps: ``(N, T, h_i, w_i)`` for each layer, two or more.
            size: what to enlarge them to: the images' size or, with ``upsample=False``, the largest map's.

        Returns:
            ``(N, T, h, w)``.
        """
        return torch.stack([upsample(heat, size) for heat in maps]).mean(0)

    def check_ready(self) -> None:
        """Raise if the object cannot explain yet; trainable methods override this."""

    # ------------------------------------------------------------------ the call

    @_transparent
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        show_progress: bool = False,
    ) -> Any:
        """Explain one output of each image.

        Args:
            inputs: ``(N, C, H, W)`` floating-point images, standardised as the model wants them, or a 1-tuple of
                such a tensor.
            target: the class to explain: an int for all images, a list or tensor of N ints, a tuple of ints for
                outputs with more axes, a list of N tuples, or ``None`` for the model's own decision (argmax) on
                each image. A model with one logit per image has the targets 1, the logit, and 0, the negated logit,
                and ``None`` follows its sign; for a regression pass 1. A :class:`~attrib_zoo.Contrast` asks why it is
                this class and not those that come next; a :class:`~attrib_zoo.Scalar`, or a function, explains any
                value of the outputs. Give the target explicitly with Captum's NoiseTunnel and metrics, where each noisy
                copy would otherwise get its own decision.
            additional_forward_args: passed to the model after the inputs; tensors are per image.
            show_progress: show a progress bar where a method makes many passes.

        Returns:
            A tensor of the inputs' shape, dtype and device, every channel carrying the same map, or ``(N, 1, h, w)``
            with ``upsample=False``; detached and contiguous; a 1-tuple if the inputs came as one. Higher means
            more evidence for the target. Maps are raw, not scaled unless the paper's map is or ``scale`` says so.

        Raises:
            InputError: the inputs are not floating-point, finite ``(N, C, H, W)`` images.
            TargetError: no such class, or not one target per image.
            LayerError: the layer cannot be explained.
            NotFittedError: a trainable method was neither fitted nor loaded.
        """
        images, as_tuple = self._images(inputs)
        maps = self._explain(images, TargetQuery(target), additional_forward_args, show_progress)
        result = maps.to(images.dtype)
        if self.upsample:
            result = result.expand(-1, images.shape[1], -1, -1)
        result = result.contiguous().detach()
        return (result,) if as_tuple else result

    @_transparent
    def attribute_many(
        self,
        inputs: Any,
        targets: Any,
        additional_forward_args: Any = None,
        *,
        show_progress: bool = False,
    ) -> Tensor:
        """Explain several outputs of each image in one go; they share every pass that does not depend on them.

        Args:
            inputs: as in :meth:`attribute`.
            targets: a list of T classes, explained for every image, or N lists (or an ``(N, T)`` tensor) of T
                classes, a list for each image; a :class:`~attrib_zoo.Contrast` may stand for any of them.
            additional_forward_args: as in :meth:`attribute`.
            show_progress: as in :meth:`attribute`.

        Returns:
            ``(N, T, C, H, W)``, or ``(N, T, 1, h, w)`` with ``upsample=False``; ``[:, t]`` is what
            :meth:`attribute` returns for the t-th targets.
        """
        images, _ = self._images(inputs)
        maps = self._explain(images, TargetQuery(targets, many=True), additional_forward_args, show_progress)
        result = maps.to(images.dtype).unsqueeze(2)
        if self.upsample:
            result = result.expand(-1, -1, images.shape[1], -1, -1)
        return result.contiguous().detach()

    @_eager
    def _explain(self, images: Tensor, query: TargetQuery, extra: Any, show_progress: bool) -> Tensor:
        """Maps ``(N, T, H, W)``, or ``(N, T, h, w)`` with ``upsample=False``."""
        self.check_ready()
        args = forward_args(extra)
        try:
            return self._explain_with("shared", images, query, args, show_progress)
        except ModelChangedError:  # another thread is training the model: explain its weights as they are now
            return self._explain_with("copied", images, query, args, show_progress)

    def _explain_with(
        self, weights: str, images: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool
    ) -> Tensor:
        with frozen(self.model, weights), torch.inference_mode(False), torch.no_grad():
            clean = images.clone() if images.is_inference() else images.detach()
            with self.placed(clean, args):
                return self._enlarged(clean, query, args, show_progress)

    def _enlarged(self, clean: Tensor, query: TargetQuery, args: tuple[Any, ...], show_progress: bool) -> Tensor:
        size = clean.shape[-2:]
        maps = self._as_asked(self.compute_maps(clean, query, args, show_progress), size)
        return upsample(maps, size) if self.upsample else maps

    def _as_asked(self, maps: Tensor | Sequence[Tensor], size: Sequence[int] = ()) -> Tensor:
        """Maps ``(N, T, h, w)`` of one or several layers smoothed, combined and scaled as the options say.

        Several need the images' ``size``.
        """
        parts = [maps] if isinstance(maps, Tensor) else list(maps)
        parts = [mean_filter(part.detach(), self.smooth or 1) for part in parts]
        if len(parts) > 1:
            target = size if self.upsample else [max(part.shape[axis] for part in parts) for axis in (-2, -1)]
            parts = [self.fuse(parts, target)]
        scale = self.scale or self.own_scale
        if scale is None:
            return parts[0]
        return SCALES[scale](parts[0])

    def _images(self, inputs: Any) -> tuple[Tensor, bool]:
        as_tuple = isinstance(inputs, tuple)
        if as_tuple and len(inputs) == 1:
            inputs = inputs[0]
        return check_images(inputs, type(self).__name__), as_tuple

    def placed(self, inputs: Tensor, args: Sequence[Any] = ()) -> AbstractContextManager[None]:
        """Inside, ``masking.upsample`` enlarges maps of this model's grids to where they lie on images of this shape.

        Models that pad or crop inside have cells beyond the image, or pixels beyond the grid. ``attribute`` runs in
        it; code that enlarges maps requested with ``upsample=False`` needs it too.
        """
        return placed(lambda size: self.extents(inputs, args).of(size))

    def extents(self, inputs: Tensor, args: Sequence[Any] = ()) -> Extents:
        """What grids of each size cover of images of this shape."""
        return layer_rules.look(self.model, inputs, args).extents

    # ------------------------------------------------------------------ layers

    @property
    def model(self) -> nn.Module:
        """The eager module that is explained, without wrappers; during a call, its mirror that runs in its place."""
        return unwrap(self.forward_func)  # type: ignore[arg-type]  # checked in the constructor

    def taps(self, inputs: Tensor, args: Sequence[Any] = ()) -> tuple[Tap, ...]:
        """The layers that are read for inputs of this shape, in execution order; found once per shape."""
        return self._once("layers", inputs, args, lambda: self.resolve_layers(inputs, args))

    def _once(self, question: str, inputs: Tensor, args: Sequence[Any], find: Callable[[], _T]) -> _T:
        """What ``find`` returns, computed once per shape of the inputs, and again when the model has changed.

        What does not depend on the explainer's options is shared by all explainers of a model, in
        ``backbone.layers.known``; this keeps the rest.
        """
        key, version = (question, situation(inputs, args)), known(self.model).version
        held = self._resolved.get(key)
        if held is None or held[0] is not version:
            held = self._resolved[key] = version, find()
        return cast("_T", held[1])

    def resolve_layers(self, inputs: Tensor, args: Sequence[Any]) -> tuple[Tap, ...]:
        """The layers for inputs of this shape; override it to refuse or to change what :meth:`layer_rule` finds."""
        rule = self.layer_rule()
        if rule is None:
            return ()
        return self._tested(self.layers, inputs, args, rule=rule[0], count=rule[1])

    def _tested(self, layers: Any, inputs: Tensor, args: Sequence[Any], **choice: Any) -> tuple[Tap, ...]:
        """The resolved layers, their grids tested where they could be misread."""
        traced = layer_rules.look(self.model, inputs, args)
        taps = layer_rules.resolve(self.model, layers, inputs, args, traced=traced, **choice)
        outputs = [tap for tap in taps if not tap.attended]
        if len(outputs) < len(taps) and not self.reads_attended:
            label = next(tap.label for tap in taps if tap.attended)
            raise LayerError(
                f"layers: {label!r} is no layer's output, and only TTAME can read it; for {type(self).__name__} name "
                "the block"
            )
        check_grids(self.model, outputs, inputs, args, traced=traced, everything=False)
        return taps

    def layer_rule(self) -> tuple[str, int] | None:
        """The rule and the number of layers where none are named; override it where options or the model decide."""
        return self.default_layers

    # ------------------------------------------------------------------ Captum's other names

    @classmethod
    def get_name(cls) -> str:
        """The class name, as the papers write it; of the class and of its objects."""
        return cls.__name__

    def has_convergence_delta(self) -> bool:
        """No: these maps do not sum to the score."""
        return False

    def compute_convergence_delta(self, *_: Any, **__: Any) -> Tensor:
        """Not defined for these methods."""
        raise NotImplementedError(f"{self.get_name()} promises no completeness, so it has no convergence delta")

    def attribute_future(self, *_: Any, **__: Any) -> Any:
        """Not offered, as for all image methods of Captum."""
        raise NotImplementedError(f"{self.get_name()}: attribute_future is not supported; call attribute")

    # ------------------------------------------------------------------ programs

    def as_module(self, *_: Any, **__: Any) -> Any:
        """Only for methods that need one forward pass and no gradient: CAM and the trained ones."""
        raise NotImplementedError(
            f"{self.get_name()} must need one forward pass and nothing else to become a program, and it needs "
            f"{self.cost}; use CAM, or fit TTAME, LCAMImg or LCAMFm"
        )

    def export(self, *_: Any, **__: Any) -> Any:
        """As :meth:`as_module`."""
        return self.as_module()

    # ------------------------------------------------------------------ how it is shown

    def options(self) -> dict[str, Any]:
        """The keyword-only hyper-parameters as they are now."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        return {p.name: getattr(self, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def named_layers(self) -> Any:
        """The layers that stand for the explainer in ``repr`` and in tables."""
        return self.layers

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        changed = {k: v for k, v in self.options().items() if isinstance(v, Tensor) or v != parameters[k].default}
        shown = {"layers": self.named_layers(), **changed}
        listed = ", ".join(f"{name}={_brief(value)}" for name, value in shown.items())
        return f"{type(self).__name__}({type(self.model).__name__}, {listed})"

    def _repr_html_(self) -> str:
        """For notebooks: what is explained, how, and by which paper."""
        parameters = inspect.signature(type(self).__init__).parameters
        changed = [(k, v) for k, v in self.options().items() if isinstance(v, Tensor) or v != parameters[k].default]
        shown, layers = [("model", type(self.model).__name__)], self.named_layers()
        if layers is not None or self.default_layers is not None:
            shown.append(("layers", "found in the model" if layers is None else _brief(layers)))
        shown += [(name, _brief(value)) for name, value in changed]
        if self.needs_fit:
            shown.append(("fitted", repr(self).partition(" fitted: ")[2] or "not yet: call fit"))
        return html_table([*shown, ("cost", self.cost), ("paper", self.paper)], title=self.get_name())


def _brief(value: Any) -> str:
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, Tensor):
        return f"<tensor {tuple(value.shape)}>"
    if isinstance(value, (list, tuple)) and any(isinstance(item, nn.Module) for item in value):
        return "[" + ", ".join(_brief(item) for item in value) + "]"
    return repr(value)


def check_smooth(smooth: Any) -> int | None:
    """``smooth`` if it is an odd number of cells or ``None``, else an error."""
    if smooth is None or (isinstance(smooth, int) and not isinstance(smooth, bool) and smooth > 0 and smooth % 2):
        return smooth
    raise OptionError(f"smooth: must be an odd number of cells, such as 3 or 5, or None for none, got {smooth!r}")


def check_images(inputs: Any, who: str) -> Tensor:
    """The images as one finite floating-point ``(N, C, H, W)`` tensor, or an error that says what came instead."""
    advice = "pass one float tensor of standardised images, (N, C, H, W)"
    if not isinstance(inputs, Tensor):
        held = (
            f"{type(inputs).__name__} of {len(inputs)}" if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        )
        several = isinstance(inputs, (tuple, list)) and len(inputs) > 1
        advice += "; what the model takes besides goes into additional_forward_args" if several else ""
        raise InputError(f"{who}: inputs must be a tensor (N, C, H, W) or a 1-tuple of one, got {held}; {advice}")
    if inputs.ndim != 4:
        if inputs.ndim == 3:
            advice = "add the batch axis with inputs[None]"
        elif inputs.ndim == 5:
            advice = "of frames or views explain the network inside, on each as an image: inputs.flatten(0, 1)"
        raise InputError(f"{who}: inputs must have 4 axes (N, C, H, W), got shape {tuple(inputs.shape)}; {advice}")
    if not inputs.is_floating_point():
        raise InputError(
            f"{who}: inputs must be floating-point (N, C, H, W) images, got {inputs.dtype}; "
            "convert with .float(), scale to [0, 1] and standardise them as the model was trained"
        )
    if inputs.numel() == 0:
        raise InputError(f"{who}: inputs must hold at least one (N, C, H, W) image, got shape {tuple(inputs.shape)}")
    if not bool(torch.isfinite(inputs.detach()).all()):
        raise InputError(
            f"{who}: inputs must be finite (N, C, H, W) images, got NaN or infinity; look at the preprocessing "
            "(a standard deviation of 0, or overflow in half precision)"
        )
    return inputs
