"""What to type when something is missing on a host, and how requirements changed."""

from __future__ import annotations

import pytest

from fal_notebook.advice import line_with, missing_in, requirements_change


@pytest.mark.parametrize(
    ("error", "requirement"),
    [
        (ModuleNotFoundError("No module named 'skimage'", name="skimage"), "scikit-image"),
        (ModuleNotFoundError("No module named 'cv2.x'", name="cv2.x"), "opencv-python-headless"),
        (ModuleNotFoundError("No module named 'mystery'", name="mystery"), "mystery"),
        (ImportError("Missing optional dependency 'xlrd'. Use pip or conda to install xlrd."), "xlrd"),
        (ImportError("Tracing needs it. Try `pip install -U 'tracer[otel]'` first"), "tracer[otel]"),
        (ImportError("cannot import name 'x' from 'y'"), None),
        (ValueError("pip install it"), None),
    ],
)
def test_errors_tell_what_is_missing(error: BaseException, requirement: str | None) -> None:
    assert missing_in(error) == requirement


def test_the_corrected_line_can_be_pasted() -> None:
    assert line_with("%%fal --gpu 1", "numpy==2.4") == "%%fal --gpu 1 -r numpy==2.4"
    assert line_with("%%fal ", "tracer[otel]>=1") == "%%fal -r 'tracer[otel]>=1'"


def test_a_change_of_requirements_is_a_diff() -> None:
    before = ["numpy==1.26", "six", "pandas"]
    after = ["NumPy==2.4", "pandas", "scipy"]

    assert requirements_change(before, after) == "+ scipy, numpy==1.26 → NumPy==2.4, - six"
    assert requirements_change(before, list(before)) == ""
