"""The file of results, cut anywhere, answers what was finished and no more."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from certtrain.errors import CheckpointError, UsageError
from certtrain.verification.results import ImageResult, ResultFile
from certtrain.verification.verdicts import Verdict

QUESTION = {"model_sha256": "00", "images": 6, "shape": [1, 1, 2], "eps": [0.1, 1 / 3], "methods": ["ibp", "crown"]}

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def image_results(draw):
    verdict = draw(st.sampled_from([verdict.value for verdict in Verdict]))
    return ImageResult(
        draw(st.sampled_from(QUESTION["eps"])),
        draw(st.integers(0, 5)),
        draw(st.integers(-1, 9)),
        verdict,
        draw(floats | st.just(-math.inf)),
        tuple(draw(st.lists(st.floats(0, 1e6), min_size=1, max_size=2))),
        draw(st.integers(0, 10**9)),
        torch.tensor([[draw(st.tuples(floats, floats))]]) if verdict == "attacked" else None,
    )


lists_of_results = st.lists(image_results(), max_size=8, unique_by=lambda result: result.key)


def same(x: ImageResult, y: ImageResult) -> bool:
    points = (x.point is None) == (y.point is None) and (x.point is None or torch.equal(x.point, y.point))
    return points and {**vars(x), "point": None} == {**vars(y), "point": None}


def written(path, results):
    with ResultFile(path, QUESTION) as file:
        for result in results:
            file.add(result)
    return path.read_bytes()


@given(lists_of_results, lists_of_results, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_file_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path, before, after, data):
    path = tmp_path / "results.jsonl"
    path.unlink(missing_ok=True)
    content = written(path, before)
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = before[: max(0, content[:cut].count(b"\n") - 1)]
    found = ResultFile(path, QUESTION).read()
    assert all(map(same, found, whole))
    assert len(found) == len(whole)
    assert path.read_bytes() == content[:cut], "reading changes nothing"
    written(path, after)
    kept = {result.key for result in whole}
    expected = [*whole, *(result for result in after if result.key not in kept)]
    found = ResultFile(path, QUESTION).read()
    assert len(found) == len(expected)
    assert all(map(same, found, expected))


def test_every_line_stands_on_disk_before_the_next_image(tmp_path):
    path = tmp_path / "results.jsonl"
    with ResultFile(path, QUESTION) as file:
        for image in range(3):
            file.add(ImageResult(0.1, image, 0, "proved", 1.0, (0.5,)))
            assert len(ResultFile(path, QUESTION).read()) == image + 1


@pytest.mark.parametrize("change", [{"model_sha256": "01"}, {"eps": [0.1]}, {"methods": ["ibp"]}, {"images": 7}])
def test_a_file_of_another_question_is_refused_and_stays(tmp_path, change):
    path = tmp_path / "results.jsonl"
    content = written(path, [ImageResult(0.1, 1, 0, "proved", 1.0, (0.5,))])
    (name,) = change
    with pytest.raises(UsageError, match=f"another question: {name} is .* there, .* here"):
        ResultFile(path, {**QUESTION, **change}).read()
    with pytest.raises(UsageError, match="another question"), ResultFile(path, {**QUESTION, **change}):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"x", b"{}\n", b"[1]\n", b"\xff\n", b'{"format": 2}\n', b"a,b\n1,2\n"])
def test_what_is_no_file_of_results_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="name another file"), ResultFile(path, QUESTION):
        pass
    assert path.read_bytes() == content


GOOD = json.loads(ImageResult(0.1, 1, 0, "proved", 1.0, (0.5,)).to_json())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        json.dumps({**GOOD, "verdict": "certain"}),
        json.dumps({**GOOD, "image": 6}),
        json.dumps({**GOOD, "eps": 0.2}),
        json.dumps({**GOOD, "seconds": []}),
        json.dumps({**GOOD, "verdict": "attacked"}),
        json.dumps({**GOOD, "verdict": "attacked", "point": "AAAA"}),
        json.dumps({key: value for key, value in GOOD.items() if key != "domains"}),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    written(path, [])
    with open(path, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match="line 2, is no result"):
        ResultFile(path, QUESTION).read()


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "results.jsonl"
    with (
        ResultFile(path, QUESTION),
        pytest.raises(UsageError, match="by another process"),
        ResultFile(path, QUESTION),
    ):
        pass
