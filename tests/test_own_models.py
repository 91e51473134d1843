"""A network of one's own: found beside the config, and blamed by name and line for whatever it raises."""

import json
import re
import sys

import pytest

import certtrain
from certtrain.errors import UsageError
from certtrain.models import build_model
from certtrain.models.own import modules_from
from tests.commands import TINY

PLAIN = """\
from torch import nn

def plain(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""
OWN = [text for text in TINY if not text.startswith("model.")]


@pytest.fixture
def network(tmp_path, request):
    """Write a module whose name no other test uses, beside a config; returns the module's name."""
    name = re.sub(r"\W", "_", request.node.name)[:60]

    def write(text, folder=tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        (folder / "own.yaml").write_text(f"base: digits\nmodel: {{name: '{name}:plain', options: {{}}}}\n")
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.mark.parametrize("where", ["beside the config", "in the working directory"])
def test_it_is_found_and_the_path_is_as_before(cli, network, tmp_path, monkeypatch, where):
    folder = tmp_path / "configs"
    if where == "beside the config":
        name = network(PLAIN, folder)
        config = folder / "own.yaml"
    else:
        name = network(PLAIN)
        config = "digits"
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    named = [f"model={{name: '{name}:plain'}}"] if config == "digits" else []
    outcome = cli("train", config, *named, *OWN, "--out", tmp_path / "run", "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    assert sys.path == before
    sys.modules.pop(name)  # another process, another day
    outcome = cli("verify", tmp_path / "run", "--limit", 5, "--trust-model")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["images"] == 5
    sys.modules.pop(name)
    inputs = "".join(f"(declare-const X_{i} Real)(assert (>= X_{i} 0))(assert (<= X_{i} 0))" for i in range(64))
    outputs = "".join(f"(declare-const Y_{j} Real)" for j in range(10))
    (tmp_path / "p.vnnlib").write_text(f"{inputs}{outputs}(assert (<= Y_0 -1e30))")
    outcome = cli("verify", tmp_path / "run", "--vnnlib", tmp_path / "p.vnnlib", "--trust-model")
    assert (outcome.code, outcome.out, outcome.err) == (0, "unsat\n", "")
    assert sys.path == before


@pytest.mark.parametrize("again", ["the mapping", "the folder", "the file"])
def test_a_run_of_it_that_python_started_is_resumed(cli, network, tmp_path, monkeypatch, again):
    name = network(PLAIN)
    monkeypatch.chdir(tmp_path)
    config = {"base": "digits", "model": {"name": f"{name}:plain", "options": {}}}
    certtrain.train(config, "runs/x", device="cpu", overrides=OWN)
    (tmp_path / "runs" / "x" / "model.safetensors").unlink()
    if again == "the mapping":
        certtrain.train(config, "runs/x", device="cpu", overrides=OWN, resume=True)
    else:
        named = ["runs/x"] if again == "the folder" else ["own.yaml", *OWN, "--out", "runs/x"]
        assert cli("train", *named, "--resume", "--trust-model", "--device", "cpu").code == 0
    certtrain.load_model("runs/x", trust=True)


RAISES = {
    "an error": "raise ValueError('no' + chr(10) + 'more')",
    "a long error": "raise ValueError('x' * 10_000)",
    "an error without words": "raise KeyError",
    "an assertion": "assert 1 == 2",
    "a missing key": "{}['width']",
    "the end": "raise SystemExit(0)",
    "sys.exit": "import sys; sys.exit('done')",
    "a recursion": "f = lambda: f(); f()",
    "an error of its own": "raise type('Own', (Exception,), {})('own')",
    "no memory": "raise MemoryError",
    "a stopped iteration": "next(iter(()))",
    "a division": "1 / 0",
    "an escape": "raise ValueError('\\x1b[31mred')",
}
PLACES = {
    "import": "{}\n" + PLAIN,
    "constructor": "from torch import nn\n\ndef plain(image_shape, num_classes):\n    {}\n",
    "forward": (
        "from torch import nn\n\nclass plain(nn.Module):\n    def __init__(self, image_shape, num_classes):\n"
        "        super().__init__()\n        self.layer = nn.Linear(64, num_classes)\n"
        "    def forward(self, x):\n        {}\n        return self.layer(x.flatten(1))\n"
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("raised", RAISES)
def test_whatever_it_raises_is_one_line_that_names_model_file_and_line(cli, network, tmp_path, raised, place):
    text = PLACES[place].replace("{}", RAISES[raised], 1)
    name = network(text)
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if RAISES[raised] in row)
    outcome = cli("train", tmp_path / "own.yaml", *OWN, "--out", tmp_path / "run", "--device", "cpu")
    assert outcome.code == (1 if place == "forward" else 2)
    assert f"model {name}:plain" in outcome.error
    assert outcome.error.endswith(f"{name}.py:{line})")
    assert len(outcome.error) <= 300
    assert outcome.error.isprintable()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_is_no_fault_of_the_network(cli, network, tmp_path, place):
    network(PLACES[place].replace("{}", "raise KeyboardInterrupt", 1))
    outcome = cli("train", tmp_path / "own.yaml", *OWN, "--out", tmp_path / "run", "--device", "cpu")
    assert (outcome.code, outcome.err) == (130, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def plain(:\n", "invalid syntax .*py:1"),
        ("x = 1\n  y = 2\n", "unexpected indent .*py:2"),
        ("other = 1\n", "has no attribute 'plain'"),
        ("plain = 3\n", "3 is not a callable object"),
        ("def plain():\n    pass\n", "too many positional arguments"),
        ("def plain(image_shape, num_classes):\n    return 3\n", "returned int, not a torch.nn.Module"),
        ("import no_such_library\n", "No module named 'no_such_library' .*py:1"),
    ],
)
def test_what_is_no_network(network, tmp_path, text, message):
    name = network(text)
    with modules_from(str(tmp_path)), pytest.raises(UsageError, match=f"^model {name}:plain.*{message}") as caught:
        build_model(f"{name}:plain", (1, 8, 8), 10, trust=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [":", "a:", ":a", "a b:c", "..a:b", "os:path:join", "a" * 5000 + ":b", "\0:a", "é:ü"])
def test_a_name_that_no_module_has(name):
    with pytest.raises(UsageError, match=r"^model "):
        build_model(name, (1, 8, 8), 10, trust=True)


def test_a_folder_is_looked_through_last(network, tmp_path):
    """A file named as a module of the library's own does not take its place."""
    (tmp_path / "colorsys.py").write_text("raise SystemExit")
    sys.modules.pop("colorsys", None)
    with modules_from(str(tmp_path)):
        import colorsys
    assert colorsys.rgb_to_hsv
