import pytest

pytest.register_assert_rewrite("tests.runs.comparing")  # whose comparisons tell as those of a test do
