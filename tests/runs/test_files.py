"""What the files that are in a folder make of it."""

from __future__ import annotations

import pytest

from certtrain.runs.files import has_traces_of_run, is_finished, is_run, is_started


@pytest.mark.parametrize(
    ("names", "answers"),
    [
        ((), set()),
        (("notes.txt",), set()),
        (("config.yaml",), {"run", "traces"}),  # somebody's own, or that of a run that ended as it began
        (("config.yaml", "model.json"), {"run", "started", "traces"}),
        (("config.yaml", "model.json", "last.ckpt", "model.safetensors"), {"run", "started", "traces"}),
        (("config.yaml", "model.json", "summary.json"), {"run", "started", "finished", "traces"}),
        (("model.json",), {"traces"}),
        (("model.safetensors",), {"traces"}),
        (("last.ckpt",), {"traces"}),
        (("study.json", "seed-0/config.yaml", "seed-0/model.json"), set()),  # the runs are in its folders
    ],
)
def test_what_a_folder_is(tmp_path, names, answers):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    asked = {"run": is_run, "started": is_started, "finished": is_finished, "traces": has_traces_of_run}
    assert {name for name, ask in asked.items() if ask(tmp_path)} == answers
