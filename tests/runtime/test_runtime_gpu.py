"""The full model on a GPU, random weights: graphs, bits, memory, streams, threads, captures of callers."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from measures import relative_error
from models import randomise

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig, InputError, ModelConfig
from capacitor_rt.runtime import graphs, runtime, self_check

pytestmark = pytest.mark.gpu
MIB = 1 << 20
SEEDED = FullCapacitorInferenceConfig(seed=5)
GUIDED = FullCapacitorInferenceConfig(num_steps=2, sampler="dpmpp_2m", pdg=True, seed=5)
SMALL = ModelConfig(
    model_dim=64,
    encoder_depth=1,
    decoder_depth=1,
    decoder_start_blocks=1,
    decoder_end_blocks=0,
    bottleneck_dim=16,
    adaln_low_rank_rank=4,
)


@pytest.fixture(scope="module")
def weights() -> FullCapacitor:
    """On the CPU, in float32."""
    return randomise(FullCapacitor(ModelConfig(), backend="triton"))


@pytest.fixture(scope="module")
def full(weights) -> FullCapacitor:
    return copy.deepcopy(weights).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def launches(full) -> FullCapacitor:
    """The same model, whose launches are made one by one."""
    twin = copy.deepcopy(full)
    twin.cuda_graphs = False
    return twin


@pytest.fixture
def small() -> FullCapacitor:
    return randomise(FullCapacitor(SMALL, backend="triton", strict_size=False)).to("cuda", torch.bfloat16)


def eager(weights: FullCapacitor, dtype: torch.dtype) -> FullCapacitor:
    twin = copy.deepcopy(weights)
    twin.backend = "torch"
    return twin.to("cuda", dtype)


def images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device="cuda", generator=generator)


def test_auto_serves_half_precision_by_triton(weights):
    model = copy.deepcopy(weights)
    model.backend = "auto"
    assert model.to("cuda", torch.bfloat16).runtime is not None
    assert model.to("cuda", torch.float32).runtime is None and next(model.parameters()).is_cuda
    assert model.to(torch.float16).runtime is not None and not next(model.parameters()).is_cuda


def test_few_images_have_the_bits_that_they_have_among_many(full):
    """What no documentation of wgmma or tcgen05 says: narrower tiles of one bit class leave the same bits."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows = self_check.check_bits(device, torch.bfloat16)
    if torch.cuda.get_device_capability(device) >= (8, 9):
        rows += self_check.check_fp8_bits(device, torch.bfloat16)
    assert [row.problem for row in rows if not row.ok] == []
    for height, width in ((256, 256), (224, 224), (512, 512)):
        x = images(64, height, width)
        full.narrow_tiles = False
        many = full.encode(x)
        full.narrow_tiles = True
        for n in (1, 2, 7):
            assert torch.equal(full.encode(x[:n]), many[:n]), (n, height, width)


@pytest.mark.parametrize("shape", [(3, 256, 256), (1, 64, 96), (5, 64, 64)])
def test_a_replay_gives_the_bits_of_single_launches(full, launches, shape):
    x = images(*shape)
    for _ in range(2):
        latents = full.encode(x)
        assert torch.equal(latents, launches.encode(x))
        assert all(map(torch.equal, full.encode_posterior(x), launches.encode_posterior(x)))
        for inference in (SEEDED, GUIDED):
            assert torch.equal(
                full.decode(latents, inference_config=inference), launches.decode(latents, inference_config=inference)
            )
    assert launches.stats().captures == 0 == full.stats().eager and launches.stats().replays == 0


def test_rows_are_independent_of_the_batch_and_of_their_place(full):
    x = images(131, 256, 256)
    whole = full.encode(x)
    for i in (0, 64, 127, 130):
        assert torch.equal(full.encode(x[i : i + 1]), whole[i : i + 1])
    assert torch.equal(full.encode(x.flip(0)), whole.flip(0))
    assert torch.equal(full.encode(x[40:77]), whole[40:77])
    assert torch.equal(full.encode(x), whole)


def test_micro_batches_do_not_change_a_bit(full, monkeypatch):
    x = images(11, 64, 96)
    latents = full.encode(x)
    image = full.decode(latents, inference_config=SEEDED)
    twin = copy.deepcopy(full)
    monkeypatch.setattr(runtime, "ARENA_BUDGET", 4 * MIB)
    assert torch.equal(twin.encode(x), latents)
    assert torch.equal(twin.decode(latents, inference_config=SEEDED), image)
    assert twin.stats().replays > 4


def test_latents_are_nearer_to_float32_than_those_of_eager(weights, full, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    x = torch.nn.functional.interpolate(images(8, 64, 64).float() / 127.5 - 1, scale_factor=4, mode="bilinear")
    truth = eager(weights, torch.float32)
    half = eager(weights, torch.bfloat16)
    latents = truth.encode(x)
    assert relative_error(full.encode(x), latents) <= relative_error(half.encode(x), latents)
    image = truth.decode(latents, inference_config=SEEDED)
    ours, theirs = (m.decode(latents, inference_config=SEEDED) for m in (full, half))
    assert relative_error(ours, image) <= relative_error(theirs, image)


def test_a_new_shape_is_captured_in_half_a_second(full):
    full.warmup([(256, 256, 16)], image_dtype=torch.uint8)
    before = full.stats()
    full.warmup([(256, 256, 32), (256, 256, 48)], image_dtype=torch.uint8)
    after = full.stats()
    assert after.captures - before.captures == 2
    assert (after.capture_seconds - before.capture_seconds) / 2 <= 0.5


def peak_of(call: Callable[[FullCapacitor], object], model: FullCapacitor) -> int:
    """Bytes allocated beyond what there was, at the worst moment of a call."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(model)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_peak_memory_is_a_quarter_of_eagers_activations(weights, full):
    x = images(128, 256, 256)
    activations = peak_of(lambda twin: twin.encode(x), eager(weights, torch.bfloat16))
    model = copy.deepcopy(full)
    ours = peak_of(lambda m: m.encode(x), model)
    assert ours <= model.stats().weight_nbytes + activations // 4


def test_moving_away_frees_everything_and_coming_back_gives_the_same_bits(weights):
    x = images(4, 64, 64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = copy.deepcopy(weights).to("cuda", torch.bfloat16)
    latents = model.encode(x).cpu()
    model.decode(latents.cuda(), inference_config=GUIDED)
    assert torch.cuda.memory_allocated() - before > 200 * MIB
    model.cpu()
    assert torch.cuda.memory_allocated() - before < MIB
    assert torch.equal(model.to("cuda").encode(x).cpu(), latents)
    del model
    assert torch.cuda.memory_allocated() - before < MIB


def used() -> tuple[int, int]:
    """Bytes that torch's allocator holds, and that are in use on the device."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_reserved(), total - free


def test_memory_stays_flat_over_a_thousand_calls(small, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_BOUND", 48)
    cache = small.runtime._cache
    cache.budget = 64 * MIB
    draw = random.Random(0)
    for n in range(1000):
        height, width, batch = draw.choice((64, 128)), draw.choice((64, 128)), draw.randint(1, 40)
        x = images(batch, height, width, seed=n)
        latents = small.encode(x)
        row = draw.randrange(batch)
        if n % 20 == 0:
            assert torch.equal(small.encode(x[row : row + 1]), latents[row : row + 1])
        if n % 5 == 0:
            small.decode(latents, inference_config=SEEDED)
        if n == 300:
            reserved, in_use = used()
    stats = small.stats()
    assert stats.evictions > 0 and len(cache._bound) <= 48 and stats.nbytes <= 64 * MIB
    assert used()[0] <= reserved + 32 * MIB and used()[1] <= in_use + 64 * MIB


@pytest.fixture
def limited() -> Iterator:
    """Lets torch's allocator have only so many bytes beyond what it has."""

    def limit(nbytes: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_micro_batch_halves_when_memory_runs_out(full, limited):
    x = images(128, 256, 256)
    model = copy.deepcopy(full)
    truth = full.encode(x)
    model.encode(x[:1])
    limited(160 * MIB)
    assert torch.equal(model.encode(x), truth)
    key = model.runtime._key("encode", 128, 256, 256, torch.uint8, "nchw")
    assert model.runtime._limits.images(key) < 128
    limited(8 * MIB)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.encode(images(1, 2048, 2048))
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(model.encode(x), truth)


def test_streams_are_honoured_without_waiting_for_the_device(full):
    x = [images(4, 64, 96, seed=n) for n in range(24)]
    expected = [full.encode(image) for image in x]
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for n, image in enumerate(x):
        stream = streams[n % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got.append(full.encode(image))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))
    # a call only queues: it returns while a long kernel before it still runs
    busy = torch.cuda.Stream()
    done = torch.cuda.Event()
    with torch.cuda.stream(busy):
        # its memory is there already: allocating may wait
        full.encode(x[0])
        torch.cuda._sleep(2_000_000_000)
        latents = full.encode(x[0])
        done.record()
    assert not done.query()
    done.synchronize()
    assert torch.equal(latents, expected[0])


def test_threads_with_streams_of_their_own(full):
    x = [images(3, 64, 64, seed=n) for n in range(4)]
    expected = [full.encode(image) for image in x]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for n in range(25):
                k = (i + n) % 4
                latents = full.encode(x[k])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(latents, expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_callers_graph_records_plain_launches(small):
    x, other = images(2, 64, 64), images(2, 64, 64, seed=1)
    static = x.clone()
    stream = torch.cuda.Stream()
    cold = copy.deepcopy(small)
    with pytest.raises(InputError, match="has not run encode yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cold.encode(static)
    expected = [small.encode(x), small.encode(other)]
    images_of = [small.decode(z, inference_config=FullCapacitorInferenceConfig(num_steps=2)).shape for z in expected]
    before = small.stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        latents = small.encode(static)
        image = small.decode(latents, inference_config=FullCapacitorInferenceConfig(num_steps=2))
    assert small.stats().captures == before.captures and image.shape == images_of[0]
    for new, truth in ((other, expected[1]), (x, expected[0])):
        static.copy_(new)
        graph.replay()
        assert torch.equal(latents, truth) and image.isfinite().all()
        # and calls outside go on by graphs of their own
        assert torch.equal(small.encode(new), truth)
    assert torch.equal(cold.encode(x), expected[0])


def test_compiled_callers_with_graphs_of_their_own(small):
    x = images(2, 64, 64)
    truth = copy.deepcopy(small).encode(x) * 2 + 1

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def call(image):
        return small.encode(image) * 2 + 1

    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(call(x), truth)
    assert small.stats().replays >= 4


def test_cpu_tensors_are_refused_by_name(full):
    with pytest.raises(InputError, match="image is on cpu and the model on cuda:0: move one of them with"):
        full.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="latents is on cpu"):
        full.decode(torch.zeros(1, 128, 4, 4))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_on_two_gpus():
    there = randomise(FullCapacitor(SMALL, backend="triton", strict_size=False)).to("cuda:1", torch.bfloat16)
    here = randomise(FullCapacitor(SMALL, backend="triton", strict_size=False)).to("cuda:0", torch.bfloat16)
    x = images(2, 64, 64)
    assert torch.equal(there.encode(x.to("cuda:1")).cpu(), here.encode(x).cpu())
    assert torch.cuda.current_device() == 0
