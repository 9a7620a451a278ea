"""Find the network in a file of another program, and convert it to `model.unet.UNet`.

A file holds its weights under any keys and prefixes, beside anything else, and sometimes twice:
as they are and as a running average. The network is found by the names of its tensors, wherever
they are. `model.convert.foreign_files` reads the file, `model.convert.foreign_networks` knows the
networks.

Knows no command line.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.arrays import AnyArray
from model.checkpoint import parameter_shapes
from model.config import UNetConfig
from model.convert.foreign_files import InertObject, load_content
from model.convert.foreign_networks import FAMILIES, Family, State, describe_unknown
from model.errors import CheckpointError, ConfigError, first_line

_RUN_STATE_KEYS = ({"network", "ema", "optimizer"}, {"network", "average", "optimiser"})
"""Keys of the state.pt of a training run, present and old."""

_MAX_NODES = 1_000_000
"""Values of a file that are looked at. A file can repeat one value without end."""
_MAX_DEPTH = 100
_MAX_MODULES = 10_000
"""Modules in a pickled module. They can contain each other."""

_WRAPPERS = {
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
"""Parts of names that wrappers add at any depth: torch.compile, Lightning's Fabric, FSDP and
activation checkpointing."""

_AVERAGE = re.compile(r"(^|[._ ])(ema|swa|shadow|polyak|averaged?|avg)([._ ]|$)")


@dataclasses.dataclass(frozen=True)
class ForeignNetwork:
    """A network in a file.

    Attributes:
        location: keys and prefix of its tensors, joined by dots; empty if it has none.
        family: the implementation that its names belong to.
        tensors: by the names of that implementation.
        is_average: it is a running average of weights.
    """

    location: str
    family: Family
    tensors: Mapping[str, Tensor]
    is_average: bool

    def convert(self) -> State:
        """The state dict of `model.unet.UNet`, in fp32.

        Raises:
            CheckpointError: a value is not finite, or the network is a variant that differs.
        """
        state = {
            name: tensor.detach().float()
            for name, tensor in self.tensors.items()
            if tensor.is_floating_point()
        }
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} has values that are not finite")
        try:
            converted = self.family.convert(state)
        except (RuntimeError, TypeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{self.family.name}: shapes of tensors do not fit: {first_line(error)}"
            ) from error
        infer_architecture(converted)
        return converted


@dataclasses.dataclass(frozen=True)
class Finding:
    """The network that was found in a file.

    Attributes:
        network: the one to convert.
        others: locations of other networks.
        unread_averages: locations of running averages without names of a known network.
    """

    network: ForeignNetwork
    others: tuple[str, ...] = ()
    unread_averages: tuple[str, ...] = ()


def find_network(path: Path, location: str | None = None) -> Finding:
    """Find the network in a file. If it has a running average of the weights, that is used.

    Args:
        path: of torch or safetensors.
        location: of the network, if the file has several.

    Raises:
        CheckpointError: the file cannot be read, or has no network that is known here, or has
            several of which none is the only average, or has none at `location`.
    """
    content = load_content(path)
    if isinstance(content, Mapping) and any(keys <= content.keys() for keys in _RUN_STATE_KEYS):
        raise CheckpointError(
            f"{path} is the state of a training run; resume the run with unet train, which writes "
            "a checkpoint"
        )
    groups = list(_find_tensors(content))
    networks = _remove_copies([each for group in groups for each in _match(*group)])
    if not networks:
        raise CheckpointError(f"{path}{_describe_content(content, groups)}")
    network = _choose(path, networks, location)
    matched = {id(tensor) for each in networks for tensor in each.tensors.values()}
    return Finding(
        network,
        others=tuple(each.location for each in networks if each is not network),
        unread_averages=tuple(
            where
            for where, tensors in groups
            if _AVERAGE.search(where.lower())
            and matched.isdisjoint(id(tensor) for tensor in tensors.values())
        ),
    )


def _choose(path: Path, networks: Sequence[ForeignNetwork], location: str | None) -> ForeignNetwork:
    names = ", ".join(repr(each.location) for each in networks)
    if location is not None:
        for each in networks:
            if each.location == location:
                return each
        raise CheckpointError(f"{path} has no network at {location!r}, but at {names}")
    averages = [each for each in networks if each.is_average]
    if len(networks) == 1:
        return networks[0]
    if len(averages) != 1:
        raise CheckpointError(f"{path} has several networks, at {names}; choose with --weights")
    return averages[0]


def _find_tensors(content: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every mapping of names to tensors, and every list of them, with its location.

    The state of an optimizer is left out: its tensors are not those of a network.
    """
    seen: set[int] = set()
    pending: list[tuple[str, Any, int]] = [("", content, 0)]
    for _ in range(_MAX_NODES):
        if not pending:
            return
        location, value, depth = pending.pop()
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        items: Mapping[Any, Any] = {}
        if _is_optimizer(value):
            continue
        if isinstance(value, InertObject):
            tensors = _collect_module(value)
            items = {} if tensors else value.attributes
        elif isinstance(value, Mapping):
            tensors = {str(k): each for k, each in value.items() if isinstance(each, Tensor)}
            items = value
        elif isinstance(value, list | tuple):
            items = dict(enumerate(value))
            tensors = {str(k): each for k, each in items.items() if isinstance(each, Tensor)}
        else:
            continue
        seen.add(id(value))
        if tensors:
            yield location, tensors
        for key, each in reversed(list(itertools.islice(items.items(), _MAX_NODES))):
            pending.append((f"{location}.{key}" if location else str(key), each, depth + 1))


def _is_optimizer(value: Any) -> bool:
    """Whether a value is the state dict of a `torch.optim.Optimizer`."""
    return {"state", "param_groups"} <= _as_mapping(value).keys()


def _has_optimizer(content: Any) -> bool:
    """Whether a file is the state of an optimizer, or has it under a key, or in a list there."""
    values = [content, *_as_mapping(content).values()]
    values += [each for value in values if isinstance(value, list | tuple) for each in value]
    return any(map(_is_optimizer, values))


def _collect_module(module: InertObject) -> dict[str, Tensor]:
    """The state dict of a pickled `torch.nn.Module`; empty if it is another object."""
    collected: dict[str, Tensor] = {}
    pending = [("", module)]
    for _ in range(_MAX_MODULES):
        if not pending:
            break
        prefix, current = pending.pop()
        for kind in ("_parameters", "_buffers"):
            for name, value in _as_mapping(current.attributes.get(kind)).items():
                if isinstance(value, Tensor):
                    collected[f"{prefix}{name}"] = value
        for name, child in _as_mapping(current.attributes.get("_modules")).items():
            if isinstance(child, InertObject):
                pending.append((f"{prefix}{name}.", child))
    return collected


def _as_mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _match(location: str, tensors: Mapping[str, Tensor]) -> list[ForeignNetwork]:
    """The networks in a mapping of tensors, each under its prefix."""
    shorter = {_strip_wrappers(name): tensor for name, tensor in tensors.items()}
    if len(shorter) == len(tensors):
        tensors = shorter
    prefixes = {
        name.removesuffix(family.marker): family
        for name in tensors
        for family in FAMILIES
        if name == family.marker or name.endswith(f".{family.marker}")
    }
    networks = []
    for prefix, family in prefixes.items():
        deeper = tuple(each for each in prefixes if each != prefix and each.startswith(prefix))
        where = ".".join(part for part in (location, prefix.rstrip(".")) if part)
        networks.append(
            ForeignNetwork(
                where,
                family,
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(prefix) and not (deeper and name.startswith(deeper))
                },
                is_average="n_averaged" in tensors or bool(_AVERAGE.search(where.lower())),
            )
        )
    return networks


def _strip_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _remove_copies(networks: Sequence[ForeignNetwork]) -> list[ForeignNetwork]:
    """Leave out networks whose tensors equal those of an earlier one."""
    distinct: list[ForeignNetwork] = []
    for network in networks:
        if not any(_are_equal(network.tensors, each.tensors) for each in distinct):
            distinct.append(network)
    return distinct


def _are_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )


def _describe_content(content: Any, groups: Sequence[tuple[str, dict[str, Tensor]]]) -> str:
    """Say why a file has no network that is converted."""
    if groups:
        _, largest = max(groups, key=lambda group: len(group[1]))
        return f": {describe_unknown(largest)}"
    if _has_optimizer(content):
        return (
            " contains the state of an optimizer, and no weights of a network; import the file "
            "with the network's state dict"
        )
    if isinstance(content, Mapping | list | tuple | InertObject):
        return " contains no tensors"
    return f" contains a {type(content).__name__}, not a state dict"


def infer_architecture(state: State) -> UNetConfig:
    """Infer the architecture from a state dict of `model.unet.UNet`.

    The padding leaves no trace in the tensors; it is assumed to be 1.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape.
    """
    try:
        base, channels = state["down_conv.0.first.weight"].shape[:2]
        config = UNetConfig(channels, state["final_conv.weight"].shape[0], base)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the state dict is incomplete: {error}") from error
    expected = dict(parameter_shapes(config))
    for name in sorted(expected.keys() | state.keys()):
        found = tuple(state[name].shape) if name in state else "absent"
        if expected.get(name, "absent") != found:
            raise CheckpointError(
                f"not a U-Net with base_features={base}: {name} should be "
                f"{expected.get(name, 'absent')}, but is {found}"
            )
    return config


def choose_precision(state: State, half: bool) -> dict[str, AnyArray]:
    """Convert weights to fp16 if that loses nothing or `half` asks for it; otherwise to fp32.

    Raises:
        ConfigError: `half` is set and a value is too large for fp16.
    """
    rounded = {name: tensor.half() for name, tensor in state.items()}
    if half:
        for name, tensor in rounded.items():
            if not tensor.isfinite().all():
                raise ConfigError(f"--half: {name} has values that are too large for fp16")
    elif any((tensor.float() != state[name]).any() for name, tensor in rounded.items()):
        rounded = state
    return {name: tensor.numpy() for name, tensor in rounded.items()}
