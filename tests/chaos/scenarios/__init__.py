"""The scenarios, each with the figures that it must reach (design, "The judge")."""

from tests.chaos.scenarios.accounts import renewal
from tests.chaos.scenarios.bridges import replicas, roll, sqlite, stop, term
from tests.chaos.scenarios.callers import hog
from tests.chaos.scenarios.encrypted import encrypted, encrypted_replicas
from tests.chaos.scenarios.homeservers import memory, outage, proxy, storm
from tests.chaos.scenarios.hooks import hook_replicas, hooks
from tests.chaos.scenarios.poison import poison
from tests.chaos.scenarios.real import drain, synapse
from tests.chaos.scenarios.scenario import Scenario
from tests.chaos.scenarios.stores import full, locked, network, restart
from tests.chaos.scenarios.wire import wire

_ALL = (
    Scenario(sqlite),
    Scenario(replicas, postgres=True),
    Scenario(stop, seconds=64, postgres=True),
    Scenario(term, seconds=45),
    Scenario(roll, seconds=45, postgres=True),
    Scenario(restart, postgres=True),
    Scenario(network, postgres=True),
    Scenario(full, seconds=45),
    Scenario(locked, seconds=40),
    Scenario(hog),
    Scenario(hooks),
    Scenario(hook_replicas, postgres=True),
    Scenario(outage, seconds=120),
    Scenario(storm),
    Scenario(memory, seconds=0),
    Scenario(proxy, seconds=30),
    Scenario(wire),
    Scenario(poison, seconds=40),
    Scenario(renewal),
    Scenario(synapse),
    Scenario(drain, seconds=0),
    Scenario(encrypted),
    Scenario(encrypted_replicas, postgres=True),
)
SCENARIOS = {one.name: one for one in _ALL}
LONG = ("sqlite", "replicas")  # those that --seconds is meant for when none is named

__all__ = ["LONG", "SCENARIOS", "Scenario"]
