"""The compiled step: what the eager one computes, in one graph, compiled once, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from certtrain.bounds import BoundedModel
from certtrain.config.methods import METHOD_SECTIONS
from certtrain.config.smoothing import PGPESection, RGSSection
from certtrain.models import build_model
from certtrain.runtime.compilation import Compiled, announced, compiler_options, compiling_pays
from certtrain.training.cost import clean_elements, clean_macs, network_size
from certtrain.training.losses import Metrics
from certtrain.training.method import Phase, Scheduled, scheduled
from certtrain.training.methods import CCIBP, IBP, MTLIBP, SABR, STAPS, TAPS, Adversarial, CrownIBP, ExpIBP, Natural
from certtrain.training.smoothing import smoothed
from certtrain.training.step import GradientStep, Step
from tests.networks import randomized

BATCH = 6
METHODS = {
    "ibp": {"method": IBP(), "l1": 1e-4},
    "crown-ibp": {"method": CrownIBP()},
    "fused": {"method": CrownIBP(loss_fusion=True)},
    "sabr": {"method": SABR(attack={"steps": 2}, shrink=0.8)},
    "mtl-ibp": {"method": MTLIBP(kappa=[0.5, 0.1], attack={"steps": 2, "restarts": 2, "statistics": "running"})},
    "taps": {"method": TAPS(latent={"steps": 2})},
    "exp-ibp": {"method": ExpIBP(attack={"steps": 2, "clamp_to_box": False})},
    "natural": {"method": Natural()},
    "adversarial": {"method": Adversarial(attack={"steps": 2})},
    "cc-ibp": {"method": CCIBP(attack={"steps": 2})},
    "staps": {"method": STAPS(attack={"steps": 2}, latent={"steps": 2}, shrink=0.8)},
}
FOLLOWED = pytest.mark.skipif(
    not compiler_options(), reason="the compiler of torch 2.6 and 2.7 does not follow bounds: the step stays eager"
)
IN_ONE_PHASE = ("natural", "adversarial", "cc-ibp", "exp-ibp", "staps")  # others are shown in all of warmup's phases


def network(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )
    return randomized(layers).train()


def gradient_step(model: nn.Module, compiled: bool = True, **options) -> GradientStep:
    return GradientStep(
        BoundedModel(model, torch.zeros(1, 1, 8, 8)), compile_for=BATCH if compiled else None, **options
    )


def step(trained: Step, phase: Phase, seed: int = 0) -> Metrics:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(BATCH, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (BATCH,), generator=generator)
    eps_ratio = torch.rand((), generator=generator)
    at = Scheduled(0.05 * eps_ratio, eps_ratio, eps_ratio, torch.tensor(seed))
    return trained.backward(images, labels, at, phase)


def results(model: nn.Module, metrics: Metrics) -> dict[str, Tensor]:
    """Everything that a step leaves."""
    return {
        **metrics,
        **{f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None},
        **dict(model.named_buffers()),
    }


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        message = f"{name}: {{}}".format
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=message)


@pytest.fixture
def only_captured(monkeypatch):
    """Graphs are captured and differentiated as ever, but run by PyTorch: seconds instead of minutes."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options, **settings: compiler(function, backend="aot_eager", **settings)
    )
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert not counters["graph_break"]


@FOLLOWED
@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibp", "fused", "mtl-ibp"])
def test_a_compiled_step_is_the_eager_one_within_rounding(method):
    """By PyTorch's own compiler, while epsilon grows: the graphs of the other phases are parts of that one."""
    found = []
    for compiled in (True, False):
        model = network()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(results(model, step(gradient_step(model, compiled, **METHODS[method]), Phase.WARMUP)))
    check_equal(*found)


@FOLLOWED
@pytest.mark.parametrize(
    "method",
    [
        "ibp",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("fused", "mtl-ibp", "crown-ibp", "sabr", "taps")),
    ],
)
def test_one_graph_for_each_phase_whatever_the_radius(method, only_captured):
    """Epsilon and the regularizers' weight move with every step, the learning rate with some."""
    model, twin = network(), network()
    compiled, eager = gradient_step(model, **METHODS[method]), gradient_step(twin, compiled=False, **METHODS[method])
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, fused=True) for net in (model, twin)]
    phases = (Phase.BEFORE, Phase.WARMUP, Phase.FULL)
    for number, phase in enumerate(phases):
        for seed in range(3):
            check_equal(
                results(model, step(compiled, phase, seed)), results(twin, step(eager, phase, seed)), tolerance=1e-3
            )
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-4 / (1 + number + seed)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    attack = METHODS[method]["method"].attack is not None  # one more, for its gradient
    assert counters["stats"]["unique_graphs"] == len(phases) + attack


@FOLLOWED
@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm_kind", "method", "phase"),
    [("layer", "ibp", Phase.WARMUP), ("batch", "ibp", Phase.WARMUP), ("layer", "taps", Phase.FULL)],
)
def test_a_transformers_step_is_one_graph_too(norm_kind, method, phase, only_captured):
    options = {"depth": 1, "width": 8, "heads": 2, "patch": 4, "norm_kind": norm_kind}
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = randomized(build_model("vit", (1, 8, 8), 4, options=options)).train()
        found.append(results(model, step(gradient_step(model, compiled, **METHODS[method]), phase)))
    check_equal(*found, tolerance=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@FOLLOWED
@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ONE_PHASE)
def test_the_other_methods_are_one_graph_too(name, only_captured):
    method, model, twin = METHODS[name]["method"], network(), network()
    phase = Phase.FULL if method.is_robust else Phase.NATURAL
    check_equal(
        results(model, step(gradient_step(model, method=method), phase)),
        results(twin, step(gradient_step(twin, compiled=False, method=method), phase)),
    )
    assert counters["stats"]["unique_graphs"] == (1 if method.attack is None else 2)


def test_every_method_is_compiled_here():
    assert {options["method"].options.name for options in METHODS.values()} == METHOD_SECTIONS.keys()


@FOLLOWED
@pytest.mark.parametrize("section", [RGSSection(std=0.01), PGPESection(std=0.01, pairs=2)], ids=["rgs", "pgpe"])
def test_perturbed_weights_are_taken_by_the_same_graph(section, only_captured):
    model, twin = network(), network()
    compiled, eager = (smoothed(section, gradient_step(net, net is model)) for net in (model, twin))
    for seed in range(2):
        check_equal(
            results(model, step(compiled, Phase.FULL, seed)),
            results(twin, step(eager, Phase.FULL, seed)),
            tolerance=1e-3,
        )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_many_networks_may_be_trained_in_one_process(only_captured):
    for width in range(1, 11):
        linear = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 4))
        step(gradient_step(linear), Phase.NATURAL)
    assert counters["stats"]["unique_graphs"] == 10


def test_a_last_smaller_batch_is_not_compiled(only_captured):
    model = network()
    trained = gradient_step(model)
    trained.backward(torch.rand(BATCH - 1, 1, 8, 8), torch.zeros(BATCH - 1).long(), scheduled(0.1), Phase.FULL)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.slow
def test_without_a_compiler_one_warning_and_the_eager_step():
    missing = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    model, twin = (nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    compiled, eager = gradient_step(model), gradient_step(twin, compiled=False)
    with torch._inductor.config.patch(missing):
        with pytest.warns(UserWarning, match="the training step is not compiled"):
            first = step(compiled, Phase.FULL)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = step(compiled, Phase.FULL, seed=1)
    expected = step(eager, Phase.FULL)
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    expected = results(twin, step(eager, Phase.FULL, seed=1))
    assert all(torch.equal(value, expected[name]) for name, value in results(model, second).items())


@pytest.mark.filterwarnings("ignore:the training step is not compiled")
def test_an_error_of_the_users_own_is_theirs_to_see():
    class Network(nn.Linear):
        def loss(self, x: Tensor) -> Tensor:
            if x.shape[0] == BATCH:
                raise ZeroDivisionError("six images")
            return self(x).sum()

    compiled = Compiled(Network(4, 2).loss)
    with pytest.raises(ZeroDivisionError, match="six images"):
        compiled(torch.rand(BATCH, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training step is not compiled")
def test_labels_that_the_network_has_no_class_for_are_an_error():
    trained = gradient_step(network(), **METHODS["ibp"])  # compiled above: on disk
    images, labels = torch.rand(BATCH, 1, 8, 8), torch.full((BATCH,), 9)
    with pytest.raises((IndexError, RuntimeError)):
        trained.backward(images, labels, scheduled(0.1), Phase.WARMUP)


class Doubling(nn.Module):
    def twice(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("within_cache", [True, False])
def test_a_library_that_a_kill_cut_off_is_compiled_anew(within_cache, tmp_path, monkeypatch):
    """PyTorch leaves it in its cache, and every later run would end by it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    library = tmp_path / ("cache" if within_cache else "elsewhere") / "kernel.so"
    library.parent.mkdir()
    library.touch()
    compiled = Compiled(Doubling().twice)

    def load(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if library.exists():
            raise ImportError("file too short", path=str(library))
        return graph.forward

    compiled._function = torch.compile(Doubling().twice, backend=load)  # which wraps the error as it wraps its own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled(torch.ones(1)) == 2
    assert (len(caught), library.exists()) == ((0, False) if within_cache else (1, True))


def test_compiling_is_announced_and_nothing_else_is(only_captured):
    told = []
    compiled = Compiled(Doubling().twice)
    with announced(lambda: told.append("starts"), lambda: told.append("ends")):
        compiled(torch.ones(1))
        assert (told[0], told[-1]) == ("starts", "ends")
        told.clear()
        compiled(torch.ones(1))
        assert not told
    compiled(torch.ones(2))
    assert not told


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_long_runs_are_compiled_and_short_ones_are_not(device):
    """Of digits, and of CIFAR-10 as published, and of a small network in its shorter schedule: steps, and numbers."""

    def elements(name: str, shape: tuple[int, int, int], **options: int) -> int:
        normalised = {"mean": (0.5,) * shape[0], "std": (0.25,) * shape[0]}
        return clean_elements(build_model(name, shape, 10, **normalised, options=options), shape)

    assert not compiling_pays(torch.device(device), 60 * 12, elements("cnn-small", (1, 8, 8)) * 1437 * 60)
    assert compiling_pays(torch.device(device), 160 * 391, elements("cnn7", (3, 32, 32), width=64) * 50_000 * 160)
    small = elements("cnn-2layer", (3, 32, 32), width=2, linear_width=256, batch_norm=True)
    assert compiling_pays(torch.device(device), 70 * 391, small * 50_000 * 70)


def test_clean_macs_are_those_of_the_network():
    model = build_model("cnn-small", (1, 8, 8), 10)
    assert clean_macs(model, (1, 8, 8)) == network_size("cnn-small", (1, 8, 8), 10).macs
    assert model.training


def test_clean_elements_are_what_the_operations_write():
    """A convolution, a BatchNorm, a ReLU in place and a linear layer; the flattening between is a view."""
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5 * 36, 7)]
    model = nn.Sequential(*layers)
    assert clean_elements(model, (3, 8, 8)) == 3 * 5 * 36 + 7
    assert model.training
    assert int(layers[1].num_batches_tracked) == 0
