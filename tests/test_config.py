"""Settings from the environment."""

import os
from pathlib import Path

import pytest

from rapydli_flow.config import SHIPPED, Settings, settings
from rapydli_flow.errors import SettingError


def test_defaults() -> None:
    found = Settings.read({})
    assert found.cache_dir == Path.home() / ".cache" / "rapydli_flow"
    assert found.threads == len(os.sched_getaffinity(0))
    assert (found.lanes, found.verify, found.tuning) == (None, False, "on")
    assert found.known_dir == SHIPPED


def test_everything_can_be_set() -> None:
    environ = {"RAPYDLI_CACHE_DIR": "/c", "RAPYDLI_THREADS": "3", "RAPYDLI_LANES": "8", "RAPYDLI_VERIFY": "1"}
    environ |= {"RAPYDLI_COMPILERS": "4", "RAPYDLI_PEER_PORTS": "40000:40063"}
    ports = range(40000, 40064)
    assert Settings.read(environ) == Settings(Path("/c"), 3, 8, True, compilers=4, peer_ports=ports)
    assert Settings.read({"RAPYDLI_PEER_PORTS": "40000"}).peer_ports == range(40000, 40001)
    assert Settings.read({"XDG_CACHE_HOME": "/x"}).cache_dir == Path("/x/rapydli_flow")
    assert Settings.read({"RAPYDLI_TUNING": "strict"}).tuning == "strict"
    assert not Settings.read({"RAPYDLI_VERIFY": "0"}).verify
    assert Settings.read({"RAPYDLI_KNOWN_DIR": "/"}).known_dir == Path("/")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RAPYDLI_LANES": "5"}, "RAPYDLI_LANES=5: lanes are 4, 8 or 16"),
        ({"RAPYDLI_THREADS": "0"}, "RAPYDLI_THREADS=0: a rank has 1 thread or more"),
        ({"RAPYDLI_TUNING": "maybe"}, "RAPYDLI_TUNING='maybe' is not one of on, off, offline, strict"),
        ({"RAPYDLI_KNOWN_DIR": "/not/there"}, "RAPYDLI_KNOWN_DIR='/not/there' is not a folder"),
        (
            {"RAPYDLI_PEER_PORTS": "40063:40000"},
            "RAPYDLI_PEER_PORTS='40063:40000' is not a port or a range",
        ),
        ({"RAPYDLI_PEER_PORTS": "70000"}, "RAPYDLI_PEER_PORTS='70000' is not a port"),
        ({"RAPYDLI_THREADS": "many"}, "RAPYDLI_THREADS='many' is not a whole number"),
    ],
)
def test_wrong_settings_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Settings.read(environ)


def test_the_environment_is_read_once() -> None:
    assert settings() is settings()
