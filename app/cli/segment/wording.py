"""Names the flags of `unet segment` in messages of the pipeline and of a service.

Those name the parameters of a request, for example `page=0`. Knows neither engines nor HTTP.
"""

from __future__ import annotations

import dataclasses
import re

from app.errors import ServiceError
from app.inference.outputs import Options

_OPTIONS = {field.name for field in dataclasses.fields(Options)}
_PARAMETERS = (_OPTIONS - {"name", "outputs"}) | {"output"}
_VALUE = r"[\w.,#-]*\w"
_PARAMETER = re.compile(rf"(?<![\w/.-])({'|'.join(sorted(_PARAMETERS))})=({_VALUE})")


def describe_error(error: ServiceError) -> str:
    """The message of an error, with flags in place of parameters."""
    return name_flags(str(error))


def name_flags(message: str) -> str:
    """Write parameters as flags: `page=0` becomes `--page 0`.

    Args:
        message: of a service, which writes each parameter as name=value.
    """
    return _PARAMETER.sub(lambda found: f"{_to_flag(found[1])} {found[2]}", message)


def _to_flag(parameter: str) -> str:
    return "--" + parameter.replace("_", "-")
