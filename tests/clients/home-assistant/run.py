"""Home Assistant's core with the configuration.yaml of a folder: sets its notifiers and commands up, and calls them.

`run.py FOLDER`; on stdin, one JSON array per line: [domain, service, data].
"""

import asyncio
import json
import sys

from homeassistant import bootstrap, loader
from homeassistant.config import async_hass_config_yaml
from homeassistant.config_entries import ConfigEntries
from homeassistant.core import HomeAssistant
from homeassistant.setup import async_setup_component


async def main(folder: str) -> None:
    hass = HomeAssistant(folder)
    hass.config.skip_pip = True  # everything is installed
    hass.config_entries = ConfigEntries(hass, {})
    loader.async_setup(hass)
    await bootstrap.async_load_base_functionality(hass)
    config = await async_hass_config_yaml(hass)
    for domain in ("notify", "rest_command"):
        assert await async_setup_component(hass, domain, config), domain
    await hass.async_start()
    await hass.async_block_till_done()
    for line in sys.stdin:
        await hass.services.async_call(*json.loads(line), blocking=True)
    await hass.async_stop(force=True)


asyncio.run(main(sys.argv[1]))
