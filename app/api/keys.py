"""API keys: those of the settings and of a file that may change, and a limit on guessing them.

Knows no routes and no statuses. A key file has one key per line; empty lines and lines that start
with `#` are ignored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

from app.errors import SettingsError, TooManyWrongKeys, Unauthorized
from app.settings import KEY_PATTERN, KEY_RULE, PREFIX

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 65_536
"""Size of a key file."""
POLL_S = 1.0
"""Time between two looks at the key file."""
MAX_WRONG_KEYS = 10
"""Different wrong keys that a client address may send within `WINDOW_S`."""
WINDOW_S = 60.0
"""Time after which the wrong keys of an address are forgotten, from the first of them."""
MAX_ADDRESSES = 10_000
"""Client addresses that are remembered; the one that was idle longest is forgotten first."""


class KeyStore:
    """The keys that are valid now.

    Args:
        keys: of the settings; always valid.
        file: with further keys; None for none.

    Raises:
        SettingsError: the file cannot be used.
    """

    def __init__(self, keys: Iterable[str], file: Path | None = None) -> None:
        self._fixed = tuple(_hash_key(key) for key in keys)
        self._file = file
        self._loaded: tuple[int, ...] | None = None
        self._rejected: tuple[int, ...] | str | None = None
        self.digests = self._fixed
        if file is not None:
            try:
                self._loaded = _file_state(file)
                self._use(read_keys(file))
            except (OSError, ValueError) as error:
                raise SettingsError(f"{PREFIX}API_KEYS_FILE={file}: {_reason(error)}") from error

    def is_valid(self, digest: bytes) -> bool:
        """Whether a digest is that of a valid key. The time this takes says nothing about keys."""
        matches = [hmac.compare_digest(digest, each) for each in self.digests]
        return any(matches)

    async def watch(self) -> None:
        """Look at the file every second, and use its keys when it changes. Does not return."""
        while self._file is not None:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file again if it has changed. If it cannot be used, its last keys stay valid."""
        if self._file is None:
            return
        found: tuple[int, ...] | str | None = None
        try:
            found = _file_state(self._file)
            if found in (self._loaded, self._rejected):
                return
            keys = read_keys(self._file)
            self._use(keys)
            self._loaded, self._rejected = found, None
            log.info("%d API keys read from %s", len(keys), self._file)
        except (OSError, ValueError) as error:
            found = found or _reason(error)
            if found != self._rejected:  # reported once
                self._rejected = found
                log.error("the API keys stay as they were: %s: %s", self._file, _reason(error))

    def _use(self, keys: Sequence[str]) -> None:
        self.digests = (*self._fixed, *map(_hash_key, keys))


def read_keys(file: Path) -> list[str]:
    """Read a key file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, is too large, has no key, or has one that does not
            match `KEY_PATTERN`. The message quotes no key.
    """
    if not stat.S_ISREG(file.stat().st_mode):  # opening a FIFO would wait for its writer
        raise ValueError("must be a regular file")
    with file.open("rb") as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"must have at most {MAX_FILE_BYTES} bytes")
    lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    keys = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            if not KEY_PATTERN.fullmatch(line):
                raise ValueError(f"line {number} must be a key: {KEY_RULE}")
            keys.append(line)
    if not keys:
        raise ValueError("must have a key on at least one line")
    return keys


@dataclasses.dataclass
class _Attempts:
    """The keys that a client address sent.

    Attributes:
        wrong: digests of wrong keys.
        accepted: digests of valid keys.
        expires: when the wrong keys are forgotten, on the clock of `time.monotonic`.
    """

    wrong: set[bytes] = dataclasses.field(default_factory=set)
    accepted: set[bytes] = dataclasses.field(default_factory=set)
    expires: float = 0.0


class Authenticator:
    """Checks the keys of requests, and limits how many wrong ones an address may send.

    A client that repeats one wrong key, for example an old one, does not use up the limit. While
    an address has reached it, no further key is tried, except keys that were accepted from that
    address before: clients behind one proxy share its address.

    Attributes:
        addresses: what each client address sent, the one that was idle longest first.
    """

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self.addresses: OrderedDict[str, _Attempts] = OrderedDict()

    def check(self, address: str, credentials: Sequence[str]) -> None:
        """Check the credentials of a request; one of them must be a valid key.

        Args:
            address: of the client.

        Raises:
            Unauthorized: none is.
            TooManyWrongKeys: the address has sent too many wrong keys.
        """
        attempts = self._attempts_of(address)
        digests = {_hash_key(credential) for credential in credentials if credential}
        seen = digests & (attempts.accepted | attempts.wrong)
        blocked = len(attempts.wrong) >= MAX_WRONG_KEYS
        # A wrong key may have become valid since: the file may have changed.
        valid = {each for each in (seen if blocked else digests) if self.store.is_valid(each)}
        if valid:
            attempts.accepted = (attempts.accepted | valid) & set(self.store.digests)
            attempts.wrong -= valid
            return
        if blocked and digests != seen:
            seconds = max(0.0, attempts.expires - time.monotonic())
            raise TooManyWrongKeys(
                f"too many wrong keys from this address; retry in {math.ceil(seconds)} s",
                retry_after=seconds,
            )
        if not attempts.wrong:
            attempts.expires = time.monotonic() + WINDOW_S
        attempts.wrong |= digests
        if len(attempts.wrong) >= MAX_WRONG_KEYS and not blocked:
            log.warning("%s has sent %d different wrong keys", address, len(attempts.wrong))
        raise Unauthorized("send a valid key as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'")

    def _attempts_of(self, address: str) -> _Attempts:
        network = _network(address)
        attempts = self.addresses.setdefault(network, _Attempts())
        self.addresses.move_to_end(network)
        if len(self.addresses) > MAX_ADDRESSES:
            self.addresses.popitem(last=False)
        if attempts.wrong and time.monotonic() >= attempts.expires:
            attempts.wrong.clear()
        return attempts


def _network(address: str) -> str:
    """The address, or the /64 network of an IPv6 address, which one client has all of."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def _hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _file_state(file: Path) -> tuple[int, ...]:
    """Changes when the file is replaced or written, also through a symbolic link."""
    found = os.stat(file)  # noqa: PTH116
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return "is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
