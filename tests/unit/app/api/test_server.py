"""The socket that connections come in by."""

from __future__ import annotations

import socket

import pytest

from app.api.server import listen
from app.errors import SettingsError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back(host: str) -> None:
    """Nagle's algorithm would: an answer is two packets, its head and its body."""
    with (
        listen(host, 0) as listening,
        socket.create_connection(listening.getsockname()[:2]),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"UNET_PORT={port}: Address already in use"):
            listen("127.0.0.1", port)
