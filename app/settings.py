"""The settings: environment variables with the prefix UNET_, each also a flag of `unet serve`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import SettingsError

PREFIX = "UNET_"


_KEY = re.compile(r"[ -~]+")
"""What a header can carry for certain (RFC 9110, section 5.5)."""
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?")
"""As browsers write it (RFC 6454, section 6.2), or all of them."""
_STANDARD_PORT = re.compile(r"http://.*:80|https://.*:443")

_WORDS = {"None": "auto", "False": "off", "()": "none"}
"""Python's defaults as people write them."""

_Auto = Annotated[int | None, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Names = Annotated[tuple[str, ...], NoDecode]


class Settings(BaseSettings):
    """Every setting, its default, and what it means."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")

    weights_dir: Path = Field(Path("weights"), description="folder of checkpoints")
    model: str = Field("nuclei", description="name of the default model")
    reload: bool = Field(False, description="on: take in changed and new checkpoints while serving")

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or cuda:N,cuda:M")
    engine: Literal["auto", "torch", "openvino"] = Field("auto", description="what computes")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        "auto", description="of the arithmetic"
    )
    threads: _Auto = Field(None, description="CPU threads; auto is the container's CPU quota")

    max_batch: _Auto = Field(None, description="windows at once; auto depends on the device")
    max_wait_ms: _Number = Field(0, ge=0, le=10_000, description="wait to fill a batch, in ms")
    queue_windows: _Auto = Field(None, description="windows that may be in the house at once")
    queue_megapixels: _Number = Field(
        400, gt=0, description="decoded images that may be in the house at once"
    )
    queue_mb: _Number = Field(
        512, gt=0, description="uploads and answers that may be in the house at once, in 10^6 bytes"
    )
    request_timeout_s: _Number = Field(
        30, gt=0, le=86_400, description="longest time for a request"
    )
    watchdog_s: _Number = Field(60, gt=0, description="a batch that runs longer is hung")
    drain_s: _Number = Field(20, ge=0, description="time for accepted requests at the end")
    exit_on_engine_failure: bool = Field(
        False, description="on: leave the process when the engine is hung or lost"
    )

    max_upload_mb: _Number = Field(32, gt=0, description="bytes of a request, in 10^6")
    max_megapixels: _Number = Field(100, gt=0, description="pixels of an image, in 10^6")
    api_keys: _Names = Field((), description="comma-separated keys; none: no key is asked for")
    cors_origins: _Names = Field((), description="comma-separated origins of other pages")

    log_format: Literal["json", "text"] = Field("json", description="json or text")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe message that is logged"
    )

    @field_validator("threads", "max_batch", "queue_windows", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value in ("auto", "") else value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(item.strip() for item in value.split(",") if item.strip())
        if value and not names:  # a forgotten secret must not open the service to everybody
            raise ValueError("allowed are values with commas between them; unset it for none")
        return names

    @field_validator("api_keys")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(_KEY.fullmatch, value)):
            raise ValueError("allowed are ASCII characters; a header carries no others")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin) or _STANDARD_PORT.fullmatch(origin):
                raise ValueError(
                    f"{origin} is no origin; allowed are * and scheme://host[:port] as browsers "
                    "send it: lower case, no slash or path behind it, no port 80 of http or 443 of "
                    "https"
                )
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda|cuda:\d+(,cuda:\d+)*", value):
            raise ValueError("allowed are auto, cpu, cuda, cuda:N, cuda:N,cuda:M")
        return value

    @field_validator("weights_dir")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        if not value.is_dir():
            raise ValueError(
                f"there is no folder {value.absolute()}; set {PREFIX}WEIGHTS_DIR, or give "
                "--weights-dir, to one of checkpoints"
            )
        return value


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """A flag for each of these settings; what is not given is None."""
    for name in names:
        field = Settings.model_fields[name]
        default = _WORDS.get(str(field.default), field.default)
        text = f"{field.description} ({PREFIX}{name.upper()}, {default})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=None, metavar="VALUE", help=text.replace("%", "%%"))


def given_flags(args: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    """Those of `add_flags` that were given, by setting."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def load_settings(**flags: Any) -> Settings:
    """Settings from the environment; flags that were given win.

    Raises:
        SettingsError: one line that names the first wrong setting.
    """
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"]
        if isinstance(value, Path):  # a default
            value = str(value)
        elif name == "api_keys":  # secrets: what is wrong with them shows, and no more
            value = re.sub(r"[!-+\--~]", "*", str(value))
        raise SettingsError(f"{PREFIX}{name.upper()}={value!r}: {message}") from None
