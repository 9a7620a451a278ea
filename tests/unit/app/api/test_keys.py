"""API keys: the file that changes, and the limit on guessing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from app.api import keys
from app.api.keys import Authenticator, KeyStore, read_keys
from app.errors import SettingsError, TooManyWrongKeys, Unauthorized


def accepts(authenticator: Authenticator, key: str, address: str = "192.0.2.1") -> bool:
    try:
        authenticator.check(address, [key])
    except Unauthorized:
        return False
    return True


@pytest.fixture
def guard() -> Authenticator:
    return Authenticator(KeyStore(["right", "other"]))


def exhaust(guard: Authenticator, address: str = "192.0.2.1") -> None:
    for number in range(keys.MAX_WRONG_KEYS):
        assert not accepts(guard, f"wrong {number}", address)


def test_file_and_setting_are_both_valid(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the lab\n\n one \r\ntwo\n")
    guard = Authenticator(KeyStore(["fixed"], file))
    assert [accepts(guard, key) for key in ("fixed", "one", "two")] == [True] * 3
    assert not accepts(guard, "# of the lab")
    assert not accepts(guard, "")


def test_replaced_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    guard = Authenticator(KeyStore([], file))
    assert not accepts(guard, "new")
    (tmp_path / "next").write_text("new")
    (tmp_path / "next").replace(file)
    guard.store.refresh()
    assert accepts(guard, "new")
    assert not accepts(guard, "old")


def test_swapped_folder_of_a_kubernetes_secret_is_read_again(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"key{name}")
    (tmp_path / "..data").symlink_to("1")
    (tmp_path / "keys").symlink_to("..data/keys")
    guard = Authenticator(KeyStore([], tmp_path / "keys"))
    (tmp_path / "..data_tmp").symlink_to("2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    guard.store.refresh()
    assert accepts(guard, "key2")
    assert not accepts(guard, "key1")


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "folder", "binary", "fifo", "large", "a key with a space"]
)
def test_file_that_cannot_be_used_keeps_the_keys_and_is_logged_once(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("old-secret")
    guard = Authenticator(KeyStore([], file))
    file.unlink()
    match damage:
        case "empty":
            file.write_text("\n# nothing\n")
        case "folder":
            file.mkdir()
        case "binary":
            file.write_bytes(b"\xff\x00")
        case "fifo":
            os.mkfifo(file)
        case "large":
            file.write_bytes(b"a\n" * keys.MAX_FILE_BYTES)
        case "a key with a space":
            file.write_text("new\nnew secret\n")
    started = time.monotonic()
    for _ in range(3):
        guard.store.refresh()
    assert time.monotonic() - started < 1
    assert accepts(guard, "old-secret")
    (message,) = caplog.messages
    assert str(file) in message
    assert "secret" not in message.replace(str(file), "")


@pytest.mark.parametrize("content", ["", "# none", "n\u00e4h", "with space"])
def test_unusable_file_aborts_the_start(content: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(SettingsError, match=r"UNET_API_KEYS_FILE=.*keys"):
        KeyStore([], file)
    file.write_text(content)
    with pytest.raises(SettingsError, match=r"UNET_API_KEYS_FILE=.*keys"):
        KeyStore([], file)


def test_error_about_a_key_file_quotes_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("fine\ns\u00e9cret")
    with pytest.raises(ValueError, match="line 2") as error:
        read_keys(file)
    assert "cret" not in str(error.value)


def test_too_many_wrong_keys_block_the_address_alone(guard: Authenticator) -> None:
    exhaust(guard)
    for key in ("another", "right"):  # the answer does not reveal which key is right
        with pytest.raises(TooManyWrongKeys) as error:
            accepts(guard, key)
        assert error.value.retry_after == pytest.approx(keys.WINDOW_S, abs=5)
    assert accepts(guard, "right", "192.0.2.2")


def test_block_ends_after_its_time(guard: Authenticator, monkeypatch: pytest.MonkeyPatch) -> None:
    exhaust(guard)
    later = time.monotonic() + keys.WINDOW_S + 1
    monkeypatch.setattr(keys.time, "monotonic", lambda: later)
    assert accepts(guard, "right")


def test_repeating_one_wrong_key_does_not_block(guard: Authenticator) -> None:
    for _ in range(100):
        assert not accepts(guard, "expired")
        assert not accepts(guard, "")
    assert accepts(guard, "right")


def test_key_in_use_at_an_address_is_accepted_while_it_is_blocked(guard: Authenticator) -> None:
    assert accepts(guard, "right")
    exhaust(guard)
    assert accepts(guard, "right")
    with pytest.raises(TooManyWrongKeys):
        accepts(guard, "other")


def test_wrong_key_is_accepted_once_the_file_has_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    guard = Authenticator(KeyStore([], file))
    assert not accepts(guard, "new")
    file.write_text("new-one\nnew")
    guard.store.refresh()
    assert accepts(guard, "new")


def test_ipv6_network_counts_as_one_address(guard: Authenticator) -> None:
    for number in range(keys.MAX_WRONG_KEYS):
        assert not accepts(guard, f"wrong {number}", f"2001:db8::{number:x}")
    with pytest.raises(TooManyWrongKeys):
        accepts(guard, "another", "2001:db8::ffff:1")
    assert not accepts(guard, "another", "2001:db8:0:1::1")


def test_number_of_addresses_is_bounded(
    guard: Authenticator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "MAX_ADDRESSES", 3)
    for number in range(10):
        assert not accepts(guard, "wrong", f"192.0.2.{number}")
    assert len(guard.addresses) == 3
