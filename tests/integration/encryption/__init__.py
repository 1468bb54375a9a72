"""Encrypted rooms on a real Synapse; the peer is matrix-js-sdk with its Rust crypto, in strict mode."""
