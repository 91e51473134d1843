import pytest

from tests.studies.folders import STUDY


@pytest.fixture
def study_file(tmp_path):
    """Two learning rates, two seeds, each trained in a moment."""
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"
