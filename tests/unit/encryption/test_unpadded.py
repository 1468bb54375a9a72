import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowbridge.encryption import unpadded


@given(st.binary(), st.booleans())
def test_bytes_go_round_with_or_without_padding(raw: bytes, urlsafe: bool) -> None:
    text = unpadded.encode(raw, urlsafe=urlsafe)
    assert "=" not in text
    assert unpadded.decode(text, urlsafe=urlsafe) == raw
    assert unpadded.decode(text + "=" * (-len(text) % 4), urlsafe=urlsafe) == raw


@pytest.mark.parametrize("text", ["a", "ab cd", "é", "a-b_", None, 5, b"abcd", ["abcd"]])
def test_what_is_no_base64_is_a_value_error(text: object) -> None:
    with pytest.raises(ValueError, match="not base64"):
        unpadded.decode(text)
