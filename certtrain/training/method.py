"""What a training method is: a region that is propagated, a bound of the network on it, and a loss of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from certtrain.bounds import Bounder, Bounds, Box, linf_box
from certtrain.bounds.batch_norm import Coefficients
from certtrain.config.methods import AttackSection, MethodSection, RobustSection
from certtrain.errors import UsageError
from certtrain.training.losses import Metrics


class Phase(Enum):
    """What is minimised at this point of the schedule; a step is compiled once for each."""

    NATURAL = "natural"  # cross-entropy of the clean logits, no bounds at all
    BEFORE = "before"  # epsilon is 0: natural cross-entropy and the regularizers
    WARMUP = "warmup"  # on the way to epsilon's maximum: the method's loss and the regularizers, which fade
    FULL = "full"  # at its maximum, or on the way where nothing of the above differs: the loss alone


class Scheduled(NamedTuple):
    """What the schedules say at one step: scalar tensors on the device, so that a compiled step need not be rebuilt.

    eps: the radius now; eps_ratio: the share that is done of its way from where warmup begins to max_eps, which is
    eps / max_eps if it begins at 0; ramp: the share of warmup's steps that are done.
    key: int64, of the step's random numbers (`noise.uniform`).
    """

    eps: Tensor
    eps_ratio: Tensor
    ramp: Tensor
    key: Tensor


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one, and what the network makes of it: all that a method's losses are functions of.

    labels: (B,); positions: (B,), of the images in the whole batch.
    bounds: of the method's region, where it has one.
    adversarial: logits (B, K) at the attacked points, where the method asks for them.
    coefficients: of the BatchNorms, where the clean input went ahead.
    """

    net: Bounder
    labels: Tensor
    positions: Tensor
    bounds: Bounds | None
    adversarial: Tensor | None = None
    coefficients: Mapping[int, Coefficients] | None = None

    @property
    def region_bounds(self) -> Bounds:
        """`bounds`, of a method that has a region."""
        assert self.bounds is not None
        return self.bounds

    @property
    def adversarial_logits(self) -> Tensor:
        """`adversarial`, of a method that asks for logits."""
        assert self.adversarial is not None
        return self.adversarial

    def ibp_margins(self) -> Tensor:
        return self.net.margins_of(self.region_bounds, self.labels)


class Losses(NamedTuple):
    """Means over a part: the losses that make up the robust one, and errors, both by the names they are shown under.

    A `verified_error` is always that of a bound on the whole epsilon box.
    """

    losses: Metrics
    errors: Metrics


Options = TypeVar("Options", bound=MethodSection)


class Method(Generic[Options]):
    """What every method answers; its options come as a section, or as keyword arguments.

    is_robust: has a loss for epsilon > 0.
    has_region: propagates a set.
    asks_for_logits: its losses look at the logits at attacked points.
    asks_for_coefficients: its losses look at the BatchNorms' coefficients.
    shrink: what upper ends behind unstable ReLUs are multiplied by, where they are (`joint_pass.shrunk`).

    Raises:
        pydantic.ValidationError: an option outside its range.
    """

    Section: ClassVar[type[MethodSection]]
    is_robust: ClassVar[bool] = True
    has_region: ClassVar[bool] = True
    asks_for_logits: ClassVar[bool] = False
    asks_for_coefficients: ClassVar[bool] = False

    def __init__(self, options: Options | None = None, **fields: Any) -> None:
        self.options: Options = options or cast("Options", self.Section(**fields))
        share: float = getattr(self.options, "shrink", 1.0)  # here, and not in a step: it could not be compiled
        self.shrink = share if share < 1 else None

    @property
    def attack(self) -> AttackSection | None:
        """How points are attacked before each step, where they are."""
        return getattr(self.options, "attack", None)

    @property
    def is_of_batch_means(self) -> bool:
        """Whether `robust_loss` must be given means over the whole batch; otherwise the mean of parts' will do."""
        return False

    @property
    def differs_in_warmup(self) -> bool:
        """Whether its loss is another function while epsilon grows than once epsilon is full."""
        return False

    def region(self, images: Tensor, eps: Tensor, points: Tensor | None) -> Box:
        """The set that is propagated: for images (B, C, H, W), and the points attacked around them."""
        return linf_box(images, eps)

    def require(self, net: Bounder) -> None:
        """Raises UsageError if the method cannot train this network."""
        if self.shrink is not None and not net.rectifiers:
            raise UsageError("training.method.shrink: the network has no ReLU behind which a box could be shrunk")

    def keeps_boxes(self, phase: Phase) -> bool:
        """Whether its losses look at the boxes inside the network (`Bounds.record`)."""
        return False

    def losses(self, part: Part, at: Scheduled, phase: Phase) -> Losses:
        """The losses that `robust_loss` combines."""
        raise NotImplementedError

    def robust_loss(self, losses: Mapping[str, Tensor]) -> Tensor:
        """What `losses`, means over the whole batch, come to."""
        return losses["robust_loss"]

    def natural_weight(self, at: Scheduled) -> Tensor | float:
        """Of the cross-entropy of the clean logits, beside 1 minus it of the robust loss."""
        options = self.options
        if not isinstance(options, RobustSection):
            return 0.0
        return along(options.kappa, at.ramp) if any(options.kappa) else 1 - options.w


def along(ends: tuple[float, float], share: Tensor) -> Tensor:
    """The first of `ends` where `share` is 0, the second where it is 1, linear between."""
    return ends[0] + (ends[1] - ends[0]) * share


def scheduled(
    eps: float, eps_ratio: float = 1.0, ramp: float | None = None, like: Tensor | None = None, key: int = 0
) -> Scheduled:
    """One step's `Scheduled`, of `like`'s type and on its device; ramp: by default eps_ratio."""
    like = torch.empty(()) if like is None else like
    values = like.new_tensor((eps, eps_ratio, eps_ratio if ramp is None else ramp))
    now, ratio, share = values.unbind()
    return Scheduled(now, ratio, share, torch.tensor(key, device=like.device))
