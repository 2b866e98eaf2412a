"""Connecting to a Ray cluster (extra `ray`), for whoever gives work out to one."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
from typing import Any

from treadle.errors import ConfigError, MissingExtra

CONNECT_SECONDS = 10.0


def connected(address: str | None, workers: int, feature: str, advice: str) -> tuple[Any, bool]:
    """(ray, whether it was this that connected). address: as for ray.init, HOST:6379, ray://HOST:10001 or auto; None: a cluster of this
    machine alone, with `workers` processes. ConfigError, ending in `advice`, where none answers; MissingExtra for `feature`."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra(feature, "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return ray, False
    if address:
        _reached(address, advice)
    options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as problem:  # Ray has a dozen classes for an address where nothing answers
        raise ConfigError(f"no Ray cluster answers at {address or 'this machine'} ({str(problem).splitlines()[0]:.200}); start one with "
                          f"ray start --head and {advice}") from problem  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        for number, handler in heard.items():  # Ray puts its own in their place, which ends this process without a word
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    return ray, True


def _reached(address: str, advice: str) -> None:
    """ConfigError where nothing listens: Ray itself waits for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as problem:
            raise ConfigError(f"no Ray cluster answers at {address} ({problem}); start one with ray start --head and {advice}") from problem
