"""What a number was made with, as its JSON says."""

import pytest
import torch
from torch import nn

from certtrain.config import load_config
from certtrain.data import Split
from certtrain.runs.provenance import made_with, versions


class Fixed(nn.Module):
    """A network whose weights are not trained, as those of one that is only to be verified may be."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(2, 2))


@pytest.mark.parametrize("network", [nn.Linear(2, 2), Fixed(), nn.Flatten()])
def test_the_device_is_that_of_the_network(monkeypatch, network):
    """A machine may have a GPU that this network is not on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {torch.device(device).index}")
    split = Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    made = made_with(load_config("digits"), network, split)
    assert made["versions"]["device"].startswith("CPU (")
    assert versions("cuda:1")["device"] == "GPU 1"


def test_a_cpu_is_told_by_its_instructions_and_threads(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert versions()["device"] == "CPU (AVX512), 7 threads"
