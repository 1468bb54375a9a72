"""Any JSON value, as a hostile homeserver or device may send it."""

from hypothesis import strategies as st

TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "A" * 43, "\ud800", "\0", "ed25519:X", "@a:hs", "m.megolm.v1.aes-sha2"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=12
)
