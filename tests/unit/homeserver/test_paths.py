"""flowbridge.homeserver.paths: how a path is written for the homeserver."""

from flowbridge.homeserver import paths


def test_alias_is_joined_by_its_encoded_name() -> None:
    assert paths.join_target("#a/b:hs") == "/_matrix/client/v3/join/%23a%2Fb%3Ahs"


def test_empty_state_key_ends_the_path_with_a_slash() -> None:
    assert paths.state_target("!a", "m.room.name", "") == "/_matrix/client/v3/rooms/%21a/state/m.room.name/"
