"""Whatever is proved, attacked or judged is so in float32, whatever the process has switched on."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import torch
from torch import nn

from certtrain.bounds import Box
from certtrain.config import load_config
from certtrain.data import Dataset, Split, to_float
from certtrain.report.examples import judge
from certtrain.runs.evaluation import rehearse_verification
from certtrain.verification.answers import Question
from certtrain.verification.attacks import APGD, PGD
from certtrain.verification.branch_and_bound import Search
from certtrain.verification.properties import Case, decide
from certtrain.verification.radius import certified_radii
from certtrain.verification.verify import answers_to, verify
from tests.networks import Threshold

EPS, SEARCH = 0.05, Search(timeout=math.inf)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def images(model):
    """Eight, which the model classifies right."""
    pixels = torch.randint(0, 256, (8, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        return Split(pixels, model(to_float(pixels)).argmax(1))


def verified(*methods, arithmetic=None):
    model, asked = network(), {"attack": PGD(5, 1), "arithmetic": arithmetic, "search": SEARCH, "batch_size": 4}
    data = images(model)
    return lambda: verify(model, data, EPS, methods, **asked)


def answered(*methods):
    """As in a process that answers for another, which has asked before."""
    model = network()
    answers = answers_to(Question(methods, None, PGD(5, 1), 0, "native", SEARCH), model, images(model))
    return lambda: list(answers((EPS, range(8))))


def radii():
    model = network()
    data = images(model)
    return lambda: certified_radii(model, data, 0.3, attack=PGD(5, 1))


def decided(sign):
    """Of an output 1 + 2^-10, between which and 1 bfloat16 has no number."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1 + 2.0**-10)
    one, row = torch.ones(1, dtype=torch.float64), torch.tensor([[sign]], dtype=torch.float64)
    cases = [Case(Box(one, one), row, row[0] * (1 + 2.0**-11))]
    return lambda: decide(model, cases, [1], ["ibp", "branch-and-bound"], APGD("ce", 5), search=SEARCH)


def of_one_pixel(ask, **options):
    """Just below the threshold, and the points that attack it just above, which bfloat16 does not tell from it."""
    split = Split(torch.tensor([127], dtype=torch.uint8).view(1, 1, 1, 1), torch.tensor([0]))
    dataset = Dataset(split, split, ("dark", "bright"), mean=(0.0,), std=(1.0,))
    config = load_config(
        {
            "data": {"name": "digits"},
            "model": {"name": "mlp"},
            "epsilon": {"max": 0.003},
            "training": {"epochs": 1},
        }
    )
    return lambda: ask(config, Threshold(), dataset, **options)


ASKED = {
    "verify": partial(verified, "ibp", "crown"),
    "verify, sound": partial(verified, "ibp", "crown", arithmetic="float32"),
    "verify, branch and bound": partial(verified, "ibp", "branch-and-bound"),
    "answers": partial(answered, "ibp", "crown"),
    "answers, branch and bound": partial(answered, "ibp", "branch-and-bound"),
    "certified_radii": radii,
    "decide, at least": partial(decided, -1.0),
    "decide, at most": partial(decided, 1.0),
    "judge": partial(of_one_pixel, judge, eps=0.003, limit=1, most=1),
    "rehearse_verification": partial(of_one_pixel, rehearse_verification),
}


def bits(found):
    """All that was found, except how long it took."""
    if isinstance(found, torch.Tensor):
        return found.dtype, found.shape, found.numpy().tobytes()
    if is_dataclass(found):
        kept = (field.name for field in fields(found) if field.name not in ("seconds", "stages"))
        return {name: bits(getattr(found, name)) for name in kept}
    if isinstance(found, Mapping):
        return {key: bits(value) for key, value in found.items()}
    return [bits(one) for one in found] if isinstance(found, list | tuple) else found


@pytest.mark.parametrize("name", ASKED)
def test_products_are_float32_under_autocast_which_is_on_again_afterwards(name):
    ask, a = ASKED[name](), torch.ones(2, 2)
    expected = bits(ask())
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(ask()) == expected
        assert (a @ a).dtype is torch.bfloat16


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [0, 5])
def test_a_verification_that_ends_in_the_middle_leaves_everything_as_it_was(after):
    """Also when the interrupted computation is collected, which may be later."""
    model, a, seen = network().train(), torch.ones(2, 2), []
    data = images(model)

    def interrupt(result, total):
        seen.append(result)
        if len(seen) > after:
            raise Interrupted

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(Interrupted) as caught:
            verify(model, data, EPS, "ibp", batch_size=4, observe=interrupt)
        assert model.training
        del caught
        gc.collect()
        assert model.training
        assert (a @ a).dtype is torch.bfloat16


def test_what_is_asked_under_autocast_has_answers_of_every_kind():
    """Without which equal ones would not show that attacks and searches, too, are as they are."""
    found = {name: ASKED[name]()() for name in ASKED}
    assert {"proved", "attacked"} <= set(found["verify"][0].verdicts)
    assert found["verify, branch and bound"][0].stages[-1].proved > 0
    assert {found[f"decide, at {end}"].verdict for end in ("least", "most")} == {"sat", "unsat"}
    assert [example.prediction for example in found["judge"][1]["attacked"]] == [1]
