"""A secret is not seen in text, whole or cut, plain or encoded, and other text stays as it is."""

from __future__ import annotations

import base64
import html
import itertools
import json
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fal_agent.masking import MASK, Masker, Tail, masker_of

SECRET = 'tök3n/a+b="<c>\\'
ENCODERS = {
    "plain": str,
    "percent": lambda value: quote(value, safe=""),
    "percent, slashes kept": quote,
    "percent, lower case": lambda value: quote(value, safe="").lower(),
    "form": quote_plus,
    "query": lambda value: urlencode({"q": value}),
    "JSON": json.dumps,
    "JSON, not ASCII": lambda value: json.dumps(value, ensure_ascii=False),
    "repr": repr,
    "repr of bytes": lambda value: repr(value.encode()),
    "HTML": html.escape,
    "hex": lambda value: value.encode().hex(),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_a_secret_is_masked_however_it_is_written(encode: object) -> None:
    shown = encode(SECRET.lower() if encode is ENCODERS["percent, lower case"] else SECRET)  # type: ignore[operator]
    masker = Masker([SECRET])

    masked = masker.mask(f"before {shown} after")

    assert MASK in masked
    assert masked.startswith("before ")
    assert masked.endswith(" after")
    assert SECRET not in masked
    assert shown not in masked


@pytest.mark.parametrize("before", ["", "u", "us", "user:", "Bearer "])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_a_secret_is_masked_in_base64_wherever_it_begins_there(before: str, encode: object) -> None:
    encoded = encode(f"{before}{SECRET}!".encode()).decode()  # type: ignore[operator]

    masked = Masker([SECRET]).mask(encoded)

    assert MASK in masked
    left = masked.split(MASK)
    assert sum(map(len, left)) <= len(before) * 4 // 3 + 10  # what stands around it, and four halves


@given(st.text(alphabet="ab*\n", min_size=4, max_size=9), st.text(alphabet="ab*\n", max_size=40),
       st.lists(st.integers(0, 50), max_size=6))  # fmt: skip
def test_a_secret_is_masked_wherever_the_text_is_cut(secret: str, text: str, cuts: list[int]) -> None:
    """The text is full of beginnings of the secret, which must come out all the same."""
    masker, tail = Masker([secret]), Tail()
    whole = f"{text}{secret}{text[::-1]}"
    marks = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]

    pieces = [tail.take(masker, whole[start:stop]) for start, stop in itertools.pairwise(marks)]
    shown = "".join([*pieces, tail.end(masker)])

    assert shown == masker.mask(whole)


def test_text_that_cannot_begin_a_secret_is_not_held_back() -> None:
    assert Tail().take(Masker(["hunter22"]), "step 3 of 7\n") == "step 3 of 7\n"


def test_of_two_secrets_that_begin_alike_the_longer_is_masked_whole() -> None:
    masker, tail = Masker(["abcd", "abcdefgh"]), Tail()

    assert tail.take(masker, "x abcd") + tail.take(masker, "efgh y") + tail.end(masker) == f"x {MASK} y"


def test_each_long_line_of_a_secret_is_masked() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG\nab\n-----END KEY-----"

    masked = Masker([key]).mask("line: MIIEvQIBADANBgkqhkiG, ab")

    assert masked == f"line: {MASK}, ab"


def test_what_is_too_short_to_tell_is_left_alone() -> None:
    assert Masker(["abc", ""]).mask("abcabc") == "abcabc"


def test_data_is_masked_in_keys_and_values_and_the_rest_stays() -> None:
    data = {"text/plain": ["'hunter22'", 3], "hunter22": {"n": None}}

    assert Masker(["hunter22"]).mask_all(data) == {"text/plain": [f"'{MASK}'", 3], MASK: {"n": None}}


def test_a_masker_is_made_anew_only_for_new_values() -> None:
    first = masker_of(None, {"A": "hunter22"})

    assert masker_of(None, {}) is None
    assert masker_of(first, {"B": "hunter22"}) is first
    assert masker_of(first, {"A": "hunter33"}).mask("hunter22 hunter33") == f"{MASK} {MASK}"  # type: ignore[union-attr]
