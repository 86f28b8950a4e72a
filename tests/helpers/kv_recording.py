"""One request's KV as two real vLLM workers held it: what `kv_recorder` writes, `kv_replay` reads.

`python tests/helpers/kv_recording.py` names the recording and exits 0 when it can be replayed;
`scripts/test integration` makes it. numpy only, so that a machine without torch can read it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from mooncake_connector.layout import CacheLayout, CacheSpec, LayerLayout, layer_layout

ROOT = Path(__file__).parents[2]
HOW = "scripts/test integration -- -k recorded"
#: What the transfer id of a request that is to be recorded begins with.
MARK = "record-"
#: Names the folder that the servers write marked requests to.
FOLDER = "MOONCAKE_TEST_RECORDINGS"
#: What decides about a recording: when one of these changes, another is made.
SOURCES = (
    "tests/helpers/kv_recording.py",
    "tests/helpers/kv_recorder.py",
    "scripts/lib/tiny_model.py",
)

S = TypeVar("S", bound=msgspec.Struct)


class NoRecording(Exception):
    """There is none that can be used; the message says how to make one."""


class Tensor(msgspec.Struct, frozen=True):
    """Geometry of one layer's cache, as torch gave it; the first axis counts pages.

    Attributes:
        storage: Which of the side's storages it lies in.
        offset: Bytes from that storage's start to element 0.
        shape: Elements per axis.
        strides: In elements.
        itemsize: Bytes of an element.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    def over(self, storages: list[np.ndarray]) -> np.ndarray:
        """This tensor in other memory of the same sizes; elements are unsigned integers."""
        return np.ndarray(
            self.shape,
            f"u{self.itemsize}",
            storages[self.storage].data,
            self.offset,
            tuple(stride * self.itemsize for stride in self.strides),
        )


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: its whole cache's geometry, and the request's pages in it.

    Attributes:
        spec: What the worker told its node.
        storages: Bytes of each storage.
        tensors: By layer.
        prompt_key: As this side computed it.
        first: Per group: position of the first page.
        ids: Per group: pages by position.
        contents: By layer: the pages' elements in position order, each page dense in its axes'
            order. A page's bytes are taken from the tensor, not by way of our layout.
    """

    spec: CacheSpec
    storages: tuple[int, ...]
    tensors: dict[str, Tensor]
    prompt_key: str
    first: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    contents: dict[str, bytes]

    def layout(self, storages: list[np.ndarray]) -> CacheLayout:
        """Where the pages lie in `storages`, by the connector's own reckoning."""

        def layer(tensor: Tensor) -> LayerLayout:
            start = storages[tensor.storage].__array_interface__["data"][0] + tensor.offset
            geometry = (tensor.shape, tensor.strides, tensor.itemsize, tensor.shape[0])
            return layer_layout(start, *geometry)

        return CacheLayout(
            tuple(
                tuple(layer(self.tensors[name]) for name in group.layers)
                for group in self.spec.groups
            )
        )

    def pages(self, layer: str) -> np.ndarray:
        """What was recorded of a layer, shaped as its tensor but for the number of pages."""
        tensor = self.tensors[layer]
        elements = np.frombuffer(self.contents[layer], f"u{tensor.itemsize}")
        return elements.reshape(-1, *tensor.shape[1:])


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One request that went from prefill to decode.

    Attributes:
        tokens: Length of the prompt.
        prefill: When the last of its pages was final.
        decode: When the request was reported received, so before decode computed into its pages.
    """

    tokens: int
    prefill: Side
    decode: Side


def path() -> Path:
    """Where the recording belongs that today's sources make."""
    state = hashlib.sha256()
    for source in SOURCES:
        state.update((ROOT / source).read_bytes())
    return ROOT / f".cache/recordings/vllm-kv-{state.hexdigest()[:8]}.msgpack"


def save(file: Path, what: msgspec.Struct) -> None:
    """Write it; the file appears complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_bytes(msgspec.msgpack.encode(what))
    unfinished.replace(file)


def read(file: Path, kind: type[S]) -> S:
    """What `save` wrote. Raises `NoRecording`."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=kind)
    except FileNotFoundError:
        raise NoRecording(f"vLLM's pages are not recorded in {file}; run `{HOW}`") from None
    except msgspec.DecodeError as exc:
        raise NoRecording(f"{file} cannot be read ({exc}); run `{HOW}`") from exc


if __name__ == "__main__":
    print(path())
    try:
        read(path(), Recording)
    except NoRecording as missing:
        sys.exit(str(missing))
