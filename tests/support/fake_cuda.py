"""CUDA's streams on the CPU: work is done at once, and what a GPU might do in another order is an error.

A stream has a vector clock, and every memory block the last time that each stream read or wrote it, as race detectors
for threads have (Flanagan and Freund, FastTrack, 2009). An access must come after those that it depends on, by
``wait_stream``. Freed memory goes to the next allocation on its stream, which must by then come after all others' use.
"""

import weakref
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ALIGNMENT = 256  # of what PyTorch allocates on a GPU, at least


class Stream:
    """In the place of ``torch.cuda.Stream``."""

    _handles = count(77)

    def __init__(self, device=None, priority=0):
        self.priority, self.cuda_stream = priority, next(self._handles)
        self.clock = {}  # stream handle: how far into that stream's work this one comes after

    def wait_stream(self, other):
        for stream, time in other.clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def after(self, accesses):
        """The streams of accesses that this one does not come after."""
        return [stream for stream, time in accesses.items() if self.clock.get(stream, 0) < time]


@dataclass
class _Block:
    address: int
    size: int
    stream: Stream
    reads: dict = field(default_factory=dict)  # stream handle: time
    writes: dict = field(default_factory=dict)


class FakeCuda(TorchDispatchMode):
    """Every tensor that is made lies in aligned memory of the current stream.

    Raises AssertionError in an access that is not ordered; at its end for memory that was freed too early.

    Attributes:
        current: the stream.
        freed_early: what other streams still used, in words.
    """

    active = None

    def __init__(self):
        super().__init__()
        self.current = Stream()
        self._blocks, self._addresses, self.freed_early = {}, [], []

    def __enter__(self):
        FakeCuda.active = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        FakeCuda.active = None
        if error[0] is None:
            assert not self.freed_early, self.freed_early

    def install(self, monkeypatch):
        """In the place of what PyTorch has for a real GPU."""
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._switched)

    @contextmanager
    def _switched(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def read(self, address, what="it"):
        """The current stream's next work reads the block at an address."""
        self._access(address, what, writes=False)

    def write(self, address, what="it"):
        """The current stream's next work writes there."""
        self._access(address, what, writes=True)

    def _access(self, address, what, writes):
        block, stream = self._block(address), self.current
        if block is None:
            return
        unordered = stream.after(block.writes) + (stream.after(block.reads) if writes else [])
        assert not unordered, (
            f"{what} is {'written' if writes else 'read'} on stream {stream.cuda_stream}, and nothing orders that"
            f" after what stream {unordered[0]} does with it"
        )
        time = stream.clock[stream.cuda_stream] = stream.clock.get(stream.cuda_stream, 0) + 1
        (block.writes if writes else block.reads)[stream.cuda_stream] = time

    def _block(self, address):
        place = bisect_right(self._addresses, address)
        block = self._blocks[self._addresses[place - 1]] if place else None
        return block if block is not None and address < block.address + block.size else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {_base(tensor) for tensor in tree_leaves((args, kwargs)) if _has_memory(tensor)}
        if all(_base(tensor) in given for tensor in tree_leaves(result) if _has_memory(tensor)):
            written = {
                _base(value)
                for number, argument in enumerate(function._schema.arguments)
                for value in [args[number] if number < len(args) else kwargs.get(argument.name)]
                if _has_memory(value) and argument.alias_info is not None and argument.alias_info.is_write
            }
            if not written and function is not torch.ops.aten._local_scalar_dense.default:
                return result  # a view
        else:
            written = set()
        for address in given - written:
            self.read(address, function)
        for address in written:
            self.write(address, function)
        return tree_map(
            lambda leaf: self._placed(leaf) if _has_memory(leaf) and _base(leaf) not in given else leaf, result
        )

    def _placed(self, tensor):
        """A new tensor, moved into aligned memory."""
        storage = tensor.untyped_storage()
        raw = np.empty(storage.nbytes() + ALIGNMENT, np.uint8)
        skipped = -raw.ctypes.data % ALIGNMENT
        memory = raw[skipped : skipped + storage.nbytes()]
        with torch._C._DisableTorchDispatch():
            placed = torch.from_numpy(memory).untyped_storage()
            placed.copy_(storage)
            moved = torch.empty(0, dtype=tensor.dtype).set_(
                placed, tensor.storage_offset(), tensor.shape, tensor.stride()
            )
        block = _Block(placed.data_ptr(), storage.nbytes(), self.current)
        self._addresses.insert(bisect_right(self._addresses, block.address), block.address)
        self._blocks[block.address] = block
        weakref.finalize(memory, self._freed, block).atexit = False
        self.write(block.address)
        return moved

    def _freed(self, block):
        unordered = block.stream.after(block.writes) + block.stream.after(block.reads)
        if unordered:
            self.freed_early.append(
                f"{block.size} bytes of stream {block.stream.cuda_stream}, in use by {unordered[0]}"
            )
        self._addresses.remove(block.address)
        del self._blocks[block.address]


def _has_memory(value):
    """Whether it is a tensor; an empty one, a meta tensor and oneDNN's packed weights have no address."""
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout is not torch.strided:
        return False
    return value.untyped_storage().nbytes() > 0


def _base(tensor):
    return tensor.untyped_storage().data_ptr()
