"""What is used of OpenVINO's objects, as types: the library comes without any that mypy could follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np


class Size(Protocol):
    """One size of a shape."""

    is_static: bool

    def get_length(self) -> int:
        """The size, where it is static."""
        ...


class Rank(Protocol):
    """The number of axes of a shape."""

    is_dynamic: bool


class Shape(Protocol):
    """A shape, some of whose sizes may be free."""

    rank: Rank
    is_static: bool

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Size]: ...


class ElementType(Protocol):
    """The type of a tensor's elements."""

    def to_dtype(self) -> np.dtype[np.generic]:
        """NumPy's type for it."""
        ...


class Port(Protocol):
    """An input or output of a model."""

    def get_any_name(self) -> str:
        """One of its names."""
        ...

    def get_names(self) -> set[str]:
        """All of its names."""
        ...

    def get_partial_shape(self) -> Shape:
        """Its shape."""
        ...

    def get_element_type(self) -> ElementType:
        """The type of its elements."""
        ...


class Model(Protocol):
    """A graph that was read, not yet compiled."""

    inputs: Sequence[Port]

    def clone(self) -> Model:
        """Another graph with the same constants."""
        ...

    def reshape(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Give inputs, by name, other sizes."""
        ...


class Tensor(Protocol):
    """A tensor whose `data` is memory of the runtime's."""

    data: np.ndarray


class Request(Protocol):
    """One run at a time of a compiled model."""

    def infer(self, inputs: Mapping[str, np.ndarray], share_inputs: bool = False) -> object:
        """Run it."""
        ...

    def get_output_tensor(self, index: int) -> Tensor:
        """An output of the last run."""
        ...


class RuntimeInfo(Protocol):
    """Facts of a layer by name; a value is text, or holds it as ``value``."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> object: ...


class Output(Protocol):
    """What a layer writes."""

    def get_node(self) -> Operation:
        """The layer."""
        ...


class Operation(Protocol):
    """A layer of an execution graph."""

    def get_friendly_name(self) -> str:
        """Its name, which is no other's."""
        ...

    def input_values(self) -> Sequence[Output]:
        """What it reads."""
        ...

    def get_rt_info(self) -> RuntimeInfo:
        """What the runtime made of it."""
        ...


class RuntimeModel(Protocol):
    """An execution graph."""

    def get_ordered_ops(self) -> Sequence[Operation]:
        """Its layers in the order in which they run."""
        ...


class CompiledModel(Protocol):
    """A model that was compiled for a device."""

    inputs: Sequence[Port]
    outputs: Sequence[Port]

    def create_infer_request(self) -> Request:
        """A new request."""
        ...

    def get_runtime_model(self) -> RuntimeModel:
        """The execution graph."""
        ...
