"""What became of single test images: proved, attacked, unknown, or misclassified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from certtrain.config import Config, load_config
from certtrain.data import Dataset, to_float
from certtrain.modules import device_of, evaluating
from certtrain.runs.evaluation import verify_run
from certtrain.runtime.precision import full_precision
from certtrain.verification.attacks import predictions
from certtrain.verification.verification import Verification


@dataclass(frozen=True, eq=False)
class Example:
    """A test image (C, H, W) and what was found out about it.

    point: the image, or where it was attacked the adversarial point, within [0, 1] and in the shape of the image;
    prediction: the class of the point; margin: smallest lower bound of z_y - z_j around the image.
    """

    index: int
    image: Tensor
    label: int
    point: Tensor
    prediction: int
    margin: float


def judge(
    config: Config, model: nn.Module, dataset: Dataset, eps: float, limit: int, most: int
) -> tuple[Verification, Mapping[str, Sequence[Example]]]:
    """Verify the first `limit` test images as the configuration says, at radius `eps`.

    Returns:
        What was found, and under each verdict the first `most` examples.
    """
    (result,) = verify_run(load_config(config, {"verification.eps": eps}), model, dataset, limit)
    split = dataset.test.take(slice(len(result.correct)))
    images = to_float(split.images)
    points = images.clone()
    points[result.attacked] = result.adversarial

    def example(index: int) -> Example:
        point = points[index]
        with evaluating(model), full_precision():
            prediction = predictions(model, point[None].to(device_of(model))).item()
        margin = result.margin[index].item()
        return Example(index, images[index], int(split.labels[index]), point, int(prediction), margin)

    chosen = {verdict: flags.nonzero()[:most, 0].tolist() for verdict, flags in result.flags_by_verdict.items()}
    return result, {verdict: [example(index) for index in indices] for verdict, indices in chosen.items()}
