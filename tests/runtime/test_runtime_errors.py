"""What goes wrong: memory that runs out, devices and types that cannot serve, errors of CUDA."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from runtime_cases import DEVICE, ONE_STEP, tiny

from capacitor_kernels import launch
from capacitor_rt import FullCapacitor, InputError
from capacitor_rt.runtime import backend, first_contact, graphs, memory, packed, platform, runtime, weights
from capacitor_rt.runtime.backend import ServedAutoencoder
from capacitor_rt.runtime.memory import DeviceMemoryError

MIB = 1 << 20
ROWS = torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture
def small_device(monkeypatch):
    """A device whose allocator refuses arenas over `limit` bytes and reports 3 MiB free."""
    real = graphs.new_arena

    def limit(nbytes: int) -> None:
        def new_arena(size: int, device: torch.device) -> torch.Tensor:
            if size > nbytes:
                raise out_of_memory()
            return real(size, device)

        monkeypatch.setattr(graphs, "new_arena", new_arena)

    for module in (runtime, weights):
        monkeypatch.setattr(module, "free_bytes", lambda _: 3 * MIB)
    return limit


def test_the_micro_batch_halves_until_it_fits(small_device):
    model, twin = tiny(), tiny()
    image = ROWS.to(DEVICE)
    truth = twin.encode(image)
    needed = {n: arena_of(twin, n) for n in (1, 2, 3)}
    assert needed[1] < needed[2] < needed[3]
    small_device(needed[1])
    assert torch.equal(model.encode(image), truth)
    # 3, 1 and then a row at a time; later calls start with what is known to fit
    assert model.stats().replays + model.stats().eager == 3
    model.runtime._cache.clear()
    small_device(needed[1] - 1)
    message = r"encode of one 8x8 image needs [\d.]+ MiB beside the weights, and 3.0 MiB are free .* micro-batch of 1"
    with pytest.raises(DeviceMemoryError, match=message):
        model.encode(image)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.encode(image)
    with pytest.raises(InputError):
        model.warmup([(8, 8, 3)])
    small_device(1 << 40)
    assert torch.equal(model.encode(image), truth)


def arena_of(model: FullCapacitor, batch: int) -> int:
    key = model.runtime._key("encode", batch, 8, 8, torch.float32, "nchw")
    return runtime.cached_plan(model.config, key).arena_bytes


def test_a_batch_whose_result_does_not_fit_says_which_would(small_device, monkeypatch):
    model = tiny()
    truth = model.encode(ROWS.to(DEVICE))
    real = torch.empty

    def empty(*size, **options):
        if size == ((3, 4, 1, 1),):
            raise out_of_memory()
        return real(*size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        fits = 3 * MIB // (4 * 4)
        with pytest.raises(DeviceMemoryError, match=rf"latents of 3 images need .* a batch of {fits} would fit"):
            model.encode(ROWS.to(DEVICE))
    assert torch.equal(model.encode(ROWS.to(DEVICE)), truth)


def test_weights_that_do_not_fit_leave_the_model_usable(small_device, monkeypatch):
    model, image = tiny(), ROWS.to(DEVICE)
    # what plans know of the shapes of weights is packed from no values, once
    tiny().encode(image)

    def pack(*_):
        raise out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr(packed, "pack", pack)
        with pytest.raises(DeviceMemoryError, match=r"the packed encoder needs about [\d.]+ MiB, and 3.0 MiB are free"):
            model.encode(image)
    assert torch.equal(model.encode(image), tiny().encode(image))


def test_an_error_inside_a_launch_leaves_the_model_usable(monkeypatch):
    model, image = tiny(), ROWS.to(DEVICE)
    truth = model.encode(image)

    class Broken:
        def replay(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    (bound,) = model.runtime._cache._bound.values()
    healthy, bound.graph = bound.graph, Broken()
    message = r"replay of PlanKey\(direction='encode', batch=3, height=8, width=8, .* failed: CUDA error: an illegal"
    with pytest.raises(RuntimeError, match=message):
        model.encode(image)
    bound.graph = healthy
    assert torch.equal(model.encode(image), truth)


def test_old_arenas_and_plans_go_when_the_cache_is_full(monkeypatch):
    model = tiny()
    model.encode(ROWS[:1].to(DEVICE))
    cache = model.runtime._cache
    cache.budget = model.stats().nbytes
    model.encode(ROWS.to(DEVICE))
    # larger than the budget, but about to run
    assert model.stats().evictions == 1 and model.stats().nbytes == cache._nbytes() > cache.budget
    monkeypatch.setattr(graphs, "MAX_BOUND", 2)
    cache.budget = 1 << 40
    for n in (1, 2, 1, 3):
        model.encode(ROWS[:n].to(DEVICE))
    # 3 | 3 1 | 1 2 | 2 1 | 1 3
    assert model.stats().evictions == 3 and [r.batch for r in cache._bound] == [1, 3]


def test_arenas_are_shared_and_grow_in_steps():
    model = tiny()
    one, two, three = (arena_of(model, n) for n in (1, 2, 3))
    held = []
    for n in (1, 2, 1, 3, 2, 3):
        model.encode(ROWS[:n].to(DEVICE))
        held.append(model.stats().nbytes)
    # the second is at least twice the first, so that it serves what comes after, or takes what it needs
    second = max(two, 2 * one)
    third = 0 if three <= second else max(three, 2 * second)
    assert held == [one, one + second, one + second, *[one + second + third] * 3]
    # up to the budget of a micro-batch, beyond which nothing grows in advance
    small = tiny(memory_budget=one + 1)
    small.encode(ROWS[:1].to(DEVICE))
    small.encode(torch.zeros(1, 3, 16, 16, device=DEVICE))
    larger = runtime.cached_plan(
        small.config, small.runtime._key("encode", 1, 16, 16, torch.float32, "nchw")
    ).arena_bytes
    assert small.stats().nbytes == larger > one


@pytest.fixture
def machine(monkeypatch):
    """What is asked once per process is asked anew, before and after."""
    platform.why_not_triton.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    platform.why_not_triton.cache_clear()


def test_devices_and_types_that_cannot_serve(machine):
    model = tiny(device="cpu")
    if DEVICE == "cpu":
        with pytest.raises(InputError, match=r"has no launches for torch.float64"):
            tiny(device="cpu").double().encode(ROWS)
    machine.setattr(platform, "interpreted", lambda: False)
    platform.why_not_triton.cache_clear()
    message = r"need an NVIDIA GPU, and this is cpu: move the model with .to\('cuda'\) .*, or use backend='torch'"
    with pytest.raises(InputError, match=message):
        model.encode(ROWS)


def test_old_gpus_are_named_and_left_to_torch(machine):
    model, gpu = tiny(device="cpu"), torch.device("cuda", 0)
    machine.setattr(platform, "interpreted", lambda: False)
    machine.setattr(platform, "_why_no_launcher", lambda: None)
    machine.setattr(torch.version, "cuda", "13.0")
    machine.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    auto = tiny("auto", "cpu")
    for capability, expected in (((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")):
        machine.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        platform.why_not_triton.cache_clear()
        assert auto._serving(gpu, torch.bfloat16) == expected
        assert auto._serving(gpu, torch.float32) == "torch"
    machine.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    machine.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match=r"Tesla T4 has compute capability 7.5; .*backend='torch'"):
        runtime.Runtime(model, gpu, torch.float16)
    # an AMD GPU calls itself cuda
    for name, value in (("cuda", None), ("hip", "6.4")):
        machine.setattr(torch.version, name, value, raising=False)
        platform.why_not_triton.cache_clear()
        assert auto._serving(gpu, torch.bfloat16) == "torch"


def test_auto_leaves_to_torch_what_failed_its_check_or_does_not_build(machine):
    """On the CPU the interpreter plays the GPU; what is wrong is told once, with what to report."""
    machine.setattr(ServedAutoencoder, "_serving", lambda self, *_: "torch" if self.backend == "torch" else "triton")
    truth, image = tiny("torch"), ROWS.to(DEVICE)
    with torch.no_grad():
        expected = truth.encode(image)
    machine.setattr(first_contact, "first_contact", lambda *_: "the launch of expand disagrees: run doctor --check")
    model = tiny("auto")
    with pytest.warns(UserWarning, match="torch serves this model: the launch of expand disagrees"):
        assert torch.equal(model.encode(image), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.encode(image), expected)
    assert model.runtime is None and model.stats().folds == 0
    machine.setattr(first_contact, "first_contact", lambda *_: None)
    model = tiny("auto")

    def broken(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    machine.setattr(runtime.Runtime, "_image", broken)
    machine.setattr(backend, "build_failure", lambda error: "no C compiler: apt-get install gcc")
    with pytest.warns(UserWarning, match="torch serves this model: no C compiler: apt-get install gcc"):
        assert torch.equal(model.encode(image), expected)
    explicit = tiny("triton")
    with pytest.raises(subprocess.CalledProcessError):
        explicit.encode(image)


def test_without_triton_the_torch_backend_serves():
    program = """
import sys
sys.modules["triton"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch
from capacitor_rt import FullCapacitor, InputError
image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
print(tuple(FullCapacitor.from_pretrained("sample").encode(image).shape))
try:
    FullCapacitor.from_pretrained("sample", backend="triton").encode(image)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, message = done.stdout.splitlines()
    assert shape == "(1, 128, 2, 2)" and "Triton is not installed" in message and "backend='torch'" in message


def test_a_callers_capture_needs_a_model_that_has_run(monkeypatch):
    model, image = tiny(), ROWS.to(DEVICE)
    monkeypatch.setattr(runtime.Runtime, "_foreign_capture", lambda _: True)
    with pytest.raises(
        InputError, match=r"has not run encode of 3 images of 8x8 in this form yet.*warmup\(\), before the capture"
    ):
        model.encode(image)
    monkeypatch.undo()
    truth = model.encode(image)
    before = model.stats()
    monkeypatch.setattr(runtime.Runtime, "_foreign_capture", lambda _: True)
    assert torch.equal(model.encode(image), truth)
    # its own launches in memory of its own: nothing bound is touched
    assert model.stats().hits == before.hits and model.stats().nbytes == before.nbytes
    with torch.no_grad():
        model.encoder.to_bottleneck.bias.add_(1.0)
    with pytest.raises(InputError, match="parameters of the encoder changed"):
        model.encode(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, "direction 'sideways' is unknown: use one of 'encode', 'posterior', 'decode'"),
        ({"layout": "chwn"}, "layout 'chwn' is unknown"),
        ({"image_dtype": torch.float64}, "image_dtype has dtype torch.float64"),
        ({"direction": "decode", "image_dtype": torch.uint8}, "image_dtype has dtype torch.uint8"),
        ({"shapes": [(20, 8, 1)]}, "height 20 is not a multiple of 8: use 16 or 24"),
        ({"shapes": [(8, 8, 0)]}, r"batch 0 of shape \(8, 8, 0\) is too small"),
    ],
)
def test_bad_warmups_are_named(options, message):
    with pytest.raises(InputError, match=message):
        tiny().warmup(**({"shapes": [(8, 8, 1)]} | options))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 4, 1, 2), r"out has shape \[3, 4, 1, 2\]: the result is \[3, 4, 1, 1\]"),
        (torch.empty(3, 4, 1, 1, dtype=torch.float64), "out has dtype torch.float64"),
        (torch.empty(3, 4, 1, 1, device="meta"), "out is on meta and the model on"),
        (torch.empty(3, 4, 1, 1, requires_grad=True), "out requires grad"),
        ([], "out is a list"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_outs_are_named(backend, out, message):
    model = tiny(backend, "cpu")
    with pytest.raises(InputError, match=message):
        model.encode(ROWS, out=out)
    with pytest.raises(InputError, match="out "):
        model.decode(torch.zeros(3, 4, 1, 1), inference_config=ONE_STEP, out=out)


def test_free_memory_of_a_cpu_is_not_guessed():
    assert memory.free_bytes(torch.device("cpu")) is None
    assert memory.amount(None) == "an unknown number of MiB" and memory.amount(3 * MIB) == "3.0 MiB"
