"""Networks of any float32 parameters, great, tiny or of the other sign: what the checker of certificates says of them.

A certificate is about whatever stands in the file, and who forges one chooses that.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from certtrain.bounds import BoundedModel
from certtrain.bounds.rounding.boxes import enclosing_linf_box
from certtrain.errors import CertificateError
from certtrain.models import build_model
from certtrain.runs.checkpoint import load_model
from certtrain.verification.checker import SavedNetwork, check_row
from certtrain.verification.digests import digest
from tests.networks import randomized, save_model

NETWORKS = {
    "mlp": ("mlp", {"widths": (6,)}),
    "cnn-small": ("cnn-small", {"width": 2, "linear_width": 6}),
    "cnn-small without BatchNorm": ("cnn-small", {"width": 2, "linear_width": 6, "batch_norm": False}),
    "wide-resnet": ("wide-resnet", {"base_width": 2, "widen_factor": 1, "linear_width": 4}),
    "vit, layer": ("vit", {"width": 4, "heads": 2, "depth": 1, "mlp_width": 4, "patch": 4}),
    "vit, batch": ("vit", {"width": 4, "heads": 1, "depth": 1, "mlp_width": 4, "patch": 4, "norm_kind": "batch"}),
}
SCALES = (-1.0, 0.0, 1e-30, 1e-12, 1e-6, 1e6, 1e12, 1e18, 1e25, 1e30, 1e36)


def extreme(folder, kind, seed):
    """A network some of whose tensors, or single numbers in them, are scaled; saved, and loaded again."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    name, options = NETWORKS[kind]
    signs = torch.randint(0, 2, (3,), generator=generator) * 2.0 - 1
    architecture = {"name": name, "image_shape": [3, 8, 8], "num_classes": 3, "mean": [0.4, 0.5, 0.6],
                    "std": (torch.tensor([0.2, 0.3, 0.25]) * signs).tolist(), "options": options}  # fmt: skip
    model = randomized(build_model(**architecture))
    with torch.no_grad():
        tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            tensor = tensors[int(torch.randint(len(tensors), (), generator=generator))].view(-1)
            scale = SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
            one = int(torch.randint(len(tensor), (), generator=generator))
            part = slice(None) if seed % 2 else slice(one, one + 1)
            tensor[part] = (tensor[part] * scale).clamp(-3e38, 3e38)
        # The last layer's bias decides, whatever the rest is: otherwise nothing at all would be proved.
        next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)).bias.copy_(
            torch.tensor([10.0, 0.0, -10.0]) * 10.0 ** (seed % 7)
        )
    save_model(folder, model, architecture)
    return load_model(folder / "model.safetensors").eval(), SavedNetwork.read(folder / "model.safetensors")


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_the_checker_proves_is_so_and_the_verifier_proves_it_too(kind, tmp_path):
    proofs = 0
    for seed in range(30 if kind == "mlp" else 10):
        model, network = extreme(tmp_path, kind, seed)
        generator = torch.Generator().manual_seed(seed)
        image, eps = torch.rand(1, 3, 8, 8, generator=generator), (0.0, 0.01, 1.0)[seed % 3]
        box = enclosing_linf_box(image, eps)
        points = box.lower + (box.upper - box.lower) * torch.rand(64, 3, 8, 8, generator=generator, dtype=torch.float64)
        points = torch.cat([points, box.lower, box.upper]).float()
        net = BoundedModel(model, image)
        last = network.classifier_input(box.lower[0].numpy(), box.upper[0].numpy(), "float32")
        with torch.no_grad():
            logits = model(points)
        for label in range(3):
            other = [k for k in range(3) if k != label]
            found = net.margins(box, torch.tensor([label]), arithmetic="float32")[0, other].min().item()
            margin = last.margin(label)
            assert margin <= max(found, 0.0) * (1 + 1e-6) + 1e-7, (seed, label, margin, found)
            if margin > 0:
                proofs += 1
                assert logits.isfinite().all(), seed
                assert (logits[:, label, None] > logits[:, other]).all(), seed
    assert proofs > 2


@pytest.mark.parametrize("method", ["by intervals", "going back"])
def test_a_normalisation_with_negative_divisors(method, tmp_path):
    """Which mirrors the image: with the first layer's weights mirrored as well, the network is the same."""
    model = build_model("mlp", [1, 2, 2], 2, mean=[0.5], std=[0.25], options={"widths": [3]})
    margins = []
    for sign in (1, -1):
        with torch.no_grad():
            model.normalize.std.fill_(sign * 0.25)
            next(module for module in model.modules() if isinstance(module, nn.Linear)).weight.mul_(sign)
        description = {"name": "mlp", "image_shape": [1, 2, 2], "num_classes": 2, "mean": [0.5], "std": [sign * 0.25]}
        save_model(tmp_path, model, description | {"options": {"widths": [3]}})
        network = SavedNetwork.read(tmp_path / "model.safetensors")
        lower, upper = np.full((1, 2, 2), 0.3), np.full((1, 2, 2), 0.7)
        margins.append(
            network.classifier_input(lower, upper, "float32").margin(0)
            if method == "by intervals"
            else network.linear_bounds(lower, upper, "float32").margins(0, 2)[1]
        )
    assert margins[1] == pytest.approx(margins[0], rel=1e-6)


PIXEL = np.full((1, 1, 1, 1), 128, np.uint8)


def of_one_pixel(weight, bias):
    """Logits relu(weight·x) + bias and 0."""
    values = {"1.weight": [[weight]], "1.bias": [0.0], "3.weight": [[1.0], [0.0]], "3.bias": [bias, 0.0]}
    weights = {f"network.{name}": np.array(value, np.float32).astype(np.float64) for name, value in values.items()}
    return SavedNetwork({"name": "mlp", "image_shape": [1, 1, 1], "num_classes": 2, "options": {}}, weights, "")


def check_claim(network, method, verdict, margin):
    row = {
        "index": 0, "sha256": digest(PIXEL[0].tobytes()), "label": 0, "prediction": 0, "epsilon": 0.0,
        "method": method, "arithmetic": "float32", "margin": margin, "verdict": verdict, "adversarial": None,
        "tree": None,
    }  # fmt: skip
    check_row(row, network, PIXEL, np.array([0]))


BEYOND_IBP = ["crown-ibp", "crown", "ibp,crown", "ibp,branch-and-bound"]


@pytest.mark.parametrize("method", ["ibp", *BEYOND_IBP])
@pytest.mark.parametrize("claimed", [1e-9, 7.0, 1e300, np.inf, np.nan])
@pytest.mark.parametrize("weight", [3e38, 1.0])
def test_whoever_looks_for_margins_above_0_finds_proved_rows_alone(weight, claimed, method):
    """Of a network whose values may overflow nothing is proved; of the other a proof exists, but is not claimed."""
    with pytest.raises(CertificateError, match="verdict unknown, but the margin is"):
        check_claim(of_one_pixel(weight, 1.0), method, "unknown", claimed)


@pytest.mark.parametrize("method", BEYOND_IBP)
@pytest.mark.parametrize("claimed", [-3.0, -np.inf])
def test_a_margin_below_0_says_that_no_proof_was_found(claimed, method):
    check_claim(of_one_pixel(3e38, 1.0), method, "unknown", claimed)


def test_a_margin_by_intervals_that_is_not_finite_is_that_alone():
    check_claim(of_one_pixel(3e38, 1.0), "ibp", "unknown", -np.inf)
    for claimed in (-3.0, -1e300, 0.0):
        with pytest.raises(CertificateError, match="the margin is -inf, the certificate says"):
            check_claim(of_one_pixel(3e38, 1.0), "ibp", "unknown", claimed)


@pytest.mark.parametrize("method", ["ibp", *BEYOND_IBP])
@pytest.mark.parametrize("weight", [3e38, 1.0])
@pytest.mark.parametrize("claimed", [1e300, np.inf, np.nan])
def test_a_proof_claims_no_more_than_is_proved(claimed, weight, method):
    with pytest.raises(CertificateError, match="the margin is"):
        check_claim(of_one_pixel(weight, 1.0), method, "proved", claimed)


@pytest.mark.parametrize("row", [[1e308, -1e308], [-1e308, 1e308], [1e300, 1e308]])
def test_going_back_through_what_overflows_gives_no_bound(row):
    """Exactly, on the pixel's box, z_0 is about 1e10 and z_1 is 0."""
    checker = of_one_pixel(1.0, 1e10).linear_bounds(np.zeros((1, 1, 1)), np.ones((1, 1, 1)), "float32")
    assert checker._lower(len(checker.layers) - 1, np.array([row]), checker.boxes, {}).tolist() == [-np.inf]
