"""Words of our own that must not come back where the field has a word that people search for."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(path for path in (ROOT / "archzoo").rglob("*.py*") if path.suffix in (".py", ".pyi")),
]

# What must not be said, as a regular expression, and what to say instead.
INSTEAD = {
    r"\btwins?\b": "reference implementation",
    r"\bcop(y|ying) engines?\b": "TMA",
    r"\bcopying and multiplying apart\b": "warp specialisation",
    r"\bmatrix units?\b": "tensor cores",
    r"\btoken meets\b": "active parameters",
    r"\bidle_parameters\b": "inactive_parameters",
    r"\b(asks?|asked) for nothing\b|\bnothing is asked\b": "unlabelled",
    r"\blikeliest\b": "most likely",
    r"\bfree (loops|runs)\b": "iterations without gradients",
    r"\bruns of the stack\b": "iterations of the stack",
    r"\bExercise\b": "SyntheticTask",
    r"\bcloses_residual\b": "residual_projection",
    r"\bHARMLESS\b": "MAY_DIFFER",
    r"\bMISTAKES\b|training[./]mistakes\b": "USER_ERRORS, user_errors",
    r"\bto the interface\b": "check that a class implements the interface",
    r"\bno finite numbers?\b": "non-finite, not finite",
    r"\b(has|have|had|finds?|makes?) (no )?room\b|\broom for\b": "buffer, capacity, space",
    r"\bin the place of\b": "instead of",
    r"\bpieces\b": "chunks, segments, slices or subwords",
    r"\bwalk(s|ed)?\b": "runs over, in turn",
    r"\b(goes|go|going|went) on\b": "continues, resumes",
    r"\bwhole numbers?\b": "integer",
    r"\bleave \S+ (away|out)\b": "omit, leave unset",
    r"(?<!there) is no (YAML|checkpoint|schedule|part|configuration|tensor|tokenizer)\b": (
        '"is not a valid X"'
    ),
}


@pytest.mark.parametrize("pattern", INSTEAD)
def test_the_words_of_the_field_are_used(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"say {INSTEAD[pattern]} in:\n" + "\n".join(found)
