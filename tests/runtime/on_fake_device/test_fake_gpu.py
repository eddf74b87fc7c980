"""The fake GPU fails where a real one would, and only there."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable

import fake_cuda
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

REFUSED = (RuntimeError, torch.AcceleratorError)


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) * factor, mask=offsets < n)


@triton.jit
def tile_kernel(x_desc, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.sum(x_desc.load([0, 0]), axis=0))


def scale(x: torch.Tensor, n: int = 64, factor: float = 2.0, block: int = 64) -> None:
    scale_kernel[(1,)](x, x, n, factor, BLOCK=block)


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape or (64,), dtype=dtype, device="cuda")


def test_tensors_hold_their_values(faults):
    x = torch.arange(12.0).view(3, 4)
    t = x.to("cuda", torch.bfloat16)
    assert t.device == torch.device("cuda:0") and t.is_cuda and not t.is_pinned()
    assert torch.equal(t[1:, None, ..., 2].cpu(), x[1:, None, ..., 2].bfloat16())
    version, part = t._version, t[0]
    part.add_(1)
    t[1, 0] = 7
    assert t._version > version and part._version == t._version
    assert t.data_ptr() % 16 == 0 and torch.Tensor.data_ptr(t[1]) == t.data_ptr() + 8
    twin = copy.deepcopy(torch.nn.Parameter(t, requires_grad=False))
    assert isinstance(twin, torch.nn.Parameter) and twin.data_ptr() != t.data_ptr() and torch.equal(twin, t)
    assert torch.equal(torch.cat([t, t]).cpu(), torch.cat([t.cpu(), t.cpu()]))
    assert x.pin_memory().is_pinned() and not x.is_pinned()
    assert torch.tensor([1.0, 2.0], device="cuda")[1].item() == 2


@pytest.mark.parametrize("name", sorted(fake_cuda.REAL))
def test_it_takes_no_argument_that_torch_does_not(name):
    real, ours = fake_cuda.REAL[name], getattr(torch.cuda, name)
    pairs = [(real, ours)]
    if isinstance(ours, type) and ours.__module__ == "fake_streams":
        public = [method for method in vars(ours) if not method.startswith("_")]
        pairs += [(getattr(real, method), getattr(ours, method)) for method in public]
    elif isinstance(ours, type):
        # a context of Python's own, which is given one argument
        return
    for theirs, mine in pairs:
        known = inspect.signature(theirs).parameters
        takes = [p for p in inspect.signature(mine).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in takes] == [*known][: len(takes)], (theirs, mine)
        for p in takes:
            assert p.default == known[p.name].default or {p.default, known[p.name].default} <= {None, p.empty}, p


def test_a_capture_is_begun_as_this_torch_lets_it(gpu):
    torch.cuda.set_stream(torch.cuda.Stream())
    with pytest.raises(TypeError, match="no_such_option"):
        torch.cuda.CUDAGraph().capture_begin(no_such_option=True)
    with pytest.raises(RuntimeError, match="Unknown capture error mode"):
        torch.cuda.CUDAGraph().capture_begin(capture_error_mode="thread-local")
    assert not gpu.captures


def test_events_tell_the_time_between_works_that_are_done():
    first, second, plain = (torch.cuda.Event(enable_timing=timing) for timing in (True, True, False))
    with pytest.raises(ValueError, match="must be recorded"):
        first.elapsed_time(second)
    x = on_cuda()
    first.record()
    x.add_(1)
    second.record()
    plain.record()
    with pytest.raises(RuntimeError, match="not ready"):
        first.elapsed_time(second)
    second.synchronize()
    assert first.elapsed_time(second) > 0
    with pytest.raises(ValueError, match="enable_timing"):
        first.elapsed_time(plain)
    with pytest.raises(TypeError, match="timing"):
        torch.cuda.Event(timing=True)


def test_a_launch_that_starts_early_has_to_wait(faults):
    x = on_cuda()
    with pytest.raises(TypeError, match="scale_kernel: launch_pdl"):
        scale_kernel[(1,)](x, x, 64, 2.0, BLOCK=64, launch_pdl=True)
    assert "scale_kernel was launched with launch_pdl" in faults[0]


def test_memory_comes_back_with_the_last_tensor(gpu):
    before = torch.cuda.memory_allocated()
    t = on_cuda(256)
    part = t[:8].view(2, 4)
    del t
    assert torch.cuda.memory_allocated() == before + 1024
    del part
    assert torch.cuda.memory_allocated() == before
    gpu.limit = before + 1000
    with pytest.raises(torch.OutOfMemoryError):
        on_cuda(256)


FORBIDDEN = (
    "a compilation",
    "a device-wide wait",
    "a wait for its own stream",
    "a copy to the host",
    "a copy from the host",
    "a scalar",
    "an allocation elsewhere",
    "work on the legacy stream",
    "memory given back",
    "a dependency on work outside",
)


def forbidden(what: str) -> Callable[[], object]:
    """What no capture may hold: a call made ready outside of it."""
    x, host, side = on_cuda(), torch.zeros(64), torch.cuda.Stream()
    scale(x)

    def elsewhere() -> None:
        with torch.cuda.stream(side):
            on_cuda()

    def legacy() -> None:
        with torch.cuda.stream(torch.cuda.default_stream()):
            x.add_(1)

    def waits() -> None:
        side.wait_stream(torch.cuda.default_stream())
        x.record_stream(side)
        with torch.cuda.stream(side):
            x.add_(1)
        torch.cuda.current_stream().wait_stream(side)

    return {
        "a compilation": lambda: scale(x, block=128),
        "a device-wide wait": torch.cuda.synchronize,
        "a wait for its own stream": lambda: torch.cuda.current_stream().synchronize(),
        "a copy to the host": x.cpu,
        "a copy from the host": lambda: x.copy_(host),
        "a scalar": lambda: x[0].item(),
        "an allocation elsewhere": elsewhere,
        "work on the legacy stream": legacy,
        "memory given back": torch.cuda.empty_cache,
        "a dependency on work outside": waits,
    }[what]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_capture_refuses(what, faults):
    call = forbidden(what)
    with pytest.raises(REFUSED), torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()
    assert faults


def test_a_capture_takes_warm_launches_copies_and_memory_of_its_own(gpu):
    x, fork = on_cuda(), torch.cuda.Stream()
    scale(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        y = x.clone()
        scale(x)
        fork.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(fork):
            y.add_(x)
        torch.cuda.current_stream().wait_stream(fork)
    held = torch.cuda.memory_allocated()
    del y
    for _ in range(2):
        graph.replay()
    # the pool keeps it for the graph
    assert torch.cuda.memory_allocated() == held
    del graph
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize("forgotten", ["the join", "what came after it"])
def test_a_capture_wants_its_forks_joined(forgotten, faults):
    x, fork = on_cuda(), torch.cuda.Stream()
    with pytest.raises(REFUSED, match="during capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fork.wait_stream(torch.cuda.current_stream())
        if forgotten == "what came after it":
            torch.cuda.current_stream().wait_stream(fork)
        with torch.cuda.stream(fork):
            x.add_(1)
    assert "joined" in faults[0]


@pytest.mark.parametrize("emptied", [False, True])
def test_a_pool_ends_with_its_last_graph(emptied):
    x, pool = on_cuda(), torch.cuda.graph_pool_handle()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for graph in (first, second):
            graph.capture_begin(pool=pool)
            x.add_(1)
            graph.capture_end()
        del first, graph
        third = torch.cuda.CUDAGraph()
        third.capture_begin(pool=pool)
        third.capture_end()
        second.reset()
        third.reset()
        if emptied:
            # only the device's allocator forgets the pool
            torch.cuda.empty_cache()
        with pytest.raises(RuntimeError, match="INTERNAL ASSERT FAILED"):
            torch.cuda.CUDAGraph().capture_begin(pool=pool)


def test_a_failed_capture_takes_its_pool_with_it(faults):
    x, pool = on_cuda(), torch.cuda.graph_pool_handle()
    with pytest.raises(REFUSED), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
        x.cpu()
    with pytest.raises(RuntimeError, match="already recording"), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
        x.add_(1)


def test_captures_want_a_stream_of_their_own(faults):
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    mine = torch.cuda.Stream()
    others = [torch.cuda.Stream() for _ in range(32)]
    assert mine == others[-1] != others[0]
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=others[-1]):
        pass
    assert "somebody else" in faults[0]


@pytest.mark.parametrize("care", ["none", "wait", "record", "synchronize", "event"])
def test_memory_is_not_freed_under_the_work_of_another_stream(care, faults):
    side, x = torch.cuda.Stream(), on_cuda()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    if care == "wait":
        torch.cuda.current_stream().wait_stream(side)
    elif care == "record":
        x.record_stream(side)
    elif care == "synchronize":
        side.synchronize()
    elif care == "event":
        other = torch.cuda.Stream()
        other.wait_stream(side)
        torch.cuda.current_stream().wait_event(other.record_event())
    del x
    on_cuda()
    assert bool(faults) == (care == "none")


@pytest.mark.parametrize("waits", [False, True])
def test_a_stream_waits_for_what_another_writes(waits, faults):
    side = torch.cuda.Stream()
    x = on_cuda()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.clone().record_stream(torch.cuda.default_stream())
    side.synchronize()
    assert bool(faults) == (not waits)


def test_a_graph_wants_its_memory_alive(faults):
    x, graph = on_cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
    graph.replay()
    assert not faults
    del x
    graph.replay()
    assert "replayed" in faults[0]


def test_what_a_graph_makes_is_there_when_it_was_replayed(faults):
    x, graph = on_cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
    y.clone()
    assert "before the graph" in faults.pop()
    graph.replay()
    y.clone()
    assert not faults


def test_graphs_are_not_destroyed_inside_a_capture(faults):
    x, first = on_cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        x.add_(1)
    with pytest.raises(REFUSED), torch.cuda.graph(torch.cuda.CUDAGraph()):
        del first
        gc.collect()
    assert "destroyed" in faults[0]


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x: (x.double(), 64, 2.0),
        lambda x: (x[1:], 64, 2.0),
        lambda x: (torch.zeros(64), 64, 2.0),
        lambda x: (x, 65, 2.0),
        lambda x: (x, 1 << 40, 2.0),
        lambda x: (x, 64, "2"),
    ],
)
def test_a_kernel_refuses_what_it_was_not_compiled_for(arguments, faults):
    x = on_cuda()
    kernel = scale_kernel[(1,)](x, x, 64, 2.0, BLOCK=64)
    kernel[(1, 1, 1)](x, x, 64, 2.0, 64)
    bad, n, factor = arguments(x)
    with pytest.raises(TypeError):
        kernel[(1, 1, 1)](bad, x, n, factor, 64)
    with pytest.raises(TypeError):
        kernel[(1, 1, 1)](x, x, 64, 2.0, 32)
    # the same by Triton's own hand is another kernel
    if isinstance(n, int) and n != 64:
        scale(x, n)
    assert len(faults) == 2


def test_tensor_descriptors_are_checked(faults):
    x, y = on_cuda(64, 64), on_cuda()
    kernel = tile_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 64]), y, BLOCK=64)
    with pytest.raises(TypeError):
        kernel[(1, 1, 1)](TensorDescriptor.from_tensor(x, [32, 64]), y, 64)
    assert "tensordesc" in faults[0]


@pytest.mark.parametrize("gpu", [80, 120], indirect=True)
def test_kernels_are_compiled_for_the_gpu_at_hand_and_loaded_once(gpu):
    x = on_cuda()
    for n in (64, 64, 32, 33, 1):
        scale(x, n)
    # multiples of 16, others, and one
    assert gpu.counts["compile"] == gpu.counts["load"] == 3 and gpu.counts["launch"] == 5
    assert torch.cuda.get_device_capability() == divmod(gpu.cc, 10)


@pytest.mark.parametrize("kind", ["allocate", "load", "instantiate"])
def test_memory_runs_out_where_it_is_told_to(gpu, kind):
    x, graph = on_cuda(), torch.cuda.CUDAGraph()
    if kind != "load":
        scale(x)
    gpu.fail(kind)
    with pytest.raises(RuntimeError, match="out of memory"):
        if kind == "instantiate":
            with torch.cuda.graph(graph):
                scale(x)
        elif kind == "load":
            scale(x)
        else:
            on_cuda()
    # `torch.cuda.graph` stays on its stream when a capture fails
    torch.cuda.set_stream(torch.cuda.default_stream())
    scale(x)
