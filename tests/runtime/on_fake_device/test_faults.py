"""What went wrong on a GPU and passed every test on a CPU: graphs, their pools, memory, streams."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings

import pytest
import torch
from runtime_cases import ONE_STEP, tiny

from capacitor_rt import FullCapacitorInferenceConfig
from capacitor_rt.config import SIBLINGS, DicoConfig
from capacitor_rt.errors import InputError
from capacitor_rt.runtime.memory import DeviceMemoryError

ARCHITECTURES = (80, 89, 90, 100, 120)
OTHER_ERROR = "CUDA error: the operation is not supported"


def model_on_gpu(**options):
    return tiny(device="cuda", dtype=torch.bfloat16, **options)


def images(batch: int = 2, height: int = 16, width: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, height, width).to("cuda") * 2 - 1


def steps(n: int) -> FullCapacitorInferenceConfig:
    return FullCapacitorInferenceConfig(num_steps=n, seed=0)


def captured(call):
    """A caller's graph of a call, and what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("gpu", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_call_runs_on_every_architecture(gpu, dtype):
    model = tiny(device="cuda", dtype=dtype)
    for _ in range(2):
        latents = model.encode(images())
        assert latents.is_cuda and latents.shape == (2, 4, 2, 1)
        assert model.decode(latents, inference_config=ONE_STEP).shape == (2, 3, 16, 8)
        assert model.encode_posterior(images()).mean.shape == (2, 4, 2, 1)
    assert (model.stats().captures, model.stats().replays) == (3, 6)
    assert gpu.counts["compile"] == gpu.counts["load"] > 0


@pytest.mark.parametrize("gpu", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("sibling", SIBLINGS)
def test_a_sibling_runs_on_every_architecture(gpu, sibling):
    depth = {"decoder_start_blocks": 0} if sibling == "mdiffae_v1" else {"decoder_depth": 2, "decoder_end_blocks": 1}
    model = model_on_gpu(dico=DicoConfig(sibling), encoder_depth=2, **depth)
    calls = 0
    for _ in range(2):
        latents = model.encode(images(3))
        assert latents.is_cuda and latents.shape == (3, 4, 2, 1)
        for drop in model.config.drops:
            settings = FullCapacitorInferenceConfig(num_steps=2, seed=0, pdg=True, pdg_drop=drop)
            assert model.decode(latents, inference_config=settings).shape == (3, 3, 16, 8)
        calls = 1 + len(model.config.drops)
    assert (model.stats().captures, model.stats().replays) == (calls, 2 * calls)
    # memory that runs out, in one image after the other
    gpu.limit = gpu.allocated + 40_000
    assert model.encode(images(8)).shape == (8, 4, 2, 1)


def test_tokens_are_not_drawn_inside_a_capture(faults):
    model = model_on_gpu(dico=DicoConfig("mdiffae_v2"))
    latents, noise = torch.zeros(1, 4, 2, 1, device="cuda"), torch.zeros(1, 3, 16, 8, device="cuda")
    dropped = torch.ones(1, 1, 2, 1, device="cuda")
    settings = FullCapacitorInferenceConfig(pdg=True, pdg_drop="tokens")
    model.decode(latents, inference_config=settings, noise=noise)
    graph, result = captured(lambda: model.decode(latents, inference_config=settings, noise=noise, dropped=dropped))
    graph.replay()
    assert result.shape == (1, 3, 16, 8)
    with pytest.raises(InputError, match="which a CUDA graph that is being captured cannot do: pass dropped="):
        captured(lambda: model.decode(latents, inference_config=settings, noise=noise))


def test_launches_start_early_where_asked(gpu):
    model, plain = model_on_gpu(), model_on_gpu()
    model.dependent_launch = True
    plain.encode(images(2))
    before = gpu.counts["launch"]
    assert gpu.counts["early launch"] == 0
    model.encode(images(2))
    # every launch of a plan has a form that waits, in a graph and by itself
    early = gpu.counts["launch"] - before
    assert gpu.counts["early launch"] == early == before
    model.cuda_graphs = False
    model.encode(images(2))
    assert gpu.counts["early launch"] == gpu.counts["launch"] - before > early
    model.dependent_launch = False
    model.encode(images(2))
    assert gpu.counts["launch"] > gpu.counts["early launch"] + before


@pytest.mark.parametrize("gpu", [80, 89], indirect=True)
def test_gpus_before_hopper_have_no_dependent_launch(gpu):
    model = model_on_gpu()
    model.dependent_launch = True
    with pytest.raises(InputError, match=r"dependent_launch needs compute capability 9\.0 or later, not .* 8\."):
        model.encode(images(1))
    model.dependent_launch = False
    assert model.encode(images(1)).shape == (1, 4, 2, 1)


def test_halves_of_a_batch_are_two_branches_of_one_graph(gpu):
    model, plain = model_on_gpu(overlap=True), model_on_gpu()
    for batch, branches in ((4, 2), (3, 1), (1, 1)):
        for m in (model, plain):
            m.encode(images(batch))
        found, whole = (list(m.runtime._cache._bound.values())[-1].graph for m in (model, plain))
        nodes = sorted(n for n in found.nodes.values() if n > 1)
        assert len(nodes) == branches and min(nodes) >= max(whole.nodes.values())
    assert (model.stats().captures, model.stats().replays) == (3, 3)
    model.overlap = False
    assert model.stats().captures == 0 and model.encode(images(4)).shape == (4, 4, 2, 1)


# the pool of the graphs


def test_graphs_are_captured_again_after_an_edit():
    model = model_on_gpu()
    for _ in range(3):
        model.encode(images())
        with torch.no_grad():
            model.encoder.to_bottleneck.weight.mul_(1.5)
    assert model.stats().captures == 3


def test_graphs_are_captured_again_after_their_decoders_went():
    model = model_on_gpu()
    latents = model.encode(images())
    model.release() if hasattr(model, "release") else model.runtime.clear()
    for n in (8, 7, 6):
        model.decode(latents, inference_config=steps(n))


def test_graphs_are_captured_again_after_memory_ran_out(gpu):
    model = model_on_gpu()
    model.encode(images(2))
    x = images(8)
    gpu.fail("allocate")
    assert model.encode(x).shape[0] == 8


# captures of a caller


def test_a_callers_capture_of_a_shape_that_has_not_run_is_refused(gpu):
    model = model_on_gpu()
    model.encode(images(2))
    static = images(1, 32, 16)
    with pytest.raises(InputError, match="has not run"):
        captured(lambda: model.encode(static))
    model.encode(static)
    graph, _ = captured(lambda: model.encode(static))
    graph.replay()


@pytest.mark.parametrize("change", ["edit", "move", "cast", "clear"])
def test_a_callers_graph_outlives_a_change_of_the_model(change):
    model, static = model_on_gpu(), images()
    model.encode(static)
    graph, _ = captured(lambda: model.encode(static))
    if change == "edit":
        with torch.no_grad():
            model.encoder.to_bottleneck.weight.mul_(1.5)
    elif change == "move":
        model.cpu().cuda()
    elif change == "cast":
        model.to(torch.float16)
    else:
        model.runtime.clear()
    model.encode(static)
    graph.replay()


def test_a_callers_graph_outlives_the_eviction_of_its_decoder():
    model = model_on_gpu()
    latents, noise = model.encode(images()), torch.zeros(2, 3, 16, 8).to("cuda")
    model.decode(latents, inference_config=steps(2), noise=noise)
    graph, _ = captured(lambda: model.decode(latents, inference_config=steps(2), noise=noise))
    for n in (8, 7, 6):
        model.decode(latents, inference_config=steps(n), noise=noise)
    graph.replay()


# memory that runs out


@pytest.mark.parametrize("kind, after", [("load", 0), ("load", 2), ("instantiate", 0)])
def test_memory_that_the_driver_lacks_is_freed_for_it(gpu, kind, after):
    model, x = model_on_gpu(), images(8)
    model.decode(torch.zeros(2, 4, 2, 1).to("cuda"), inference_config=ONE_STEP)
    gpu.fail(kind, after)
    assert model.encode(x).shape[0] == 8
    assert not gpu.failures


@pytest.mark.parametrize("kind", ["load", "instantiate", "allocate"])
def test_memory_that_stays_short_is_told(gpu, kind, monkeypatch):
    model, x = model_on_gpu(), images(4)
    model.decode(torch.zeros(2, 4, 2, 1).to("cuda"), inference_config=ONE_STEP)
    count = gpu.count

    def short(what: str) -> None:
        if what == kind:
            gpu.fail(kind)
        count(what)

    monkeypatch.setattr(gpu, "count", short)
    with pytest.raises(DeviceMemoryError):
        model.encode(x)
    monkeypatch.undo()
    assert model.encode(x).shape[0] == 4


def test_a_capture_that_fails_otherwise_is_told_once_and_served_without(gpu):
    model = model_on_gpu()
    gpu.fail("instantiate", error=torch.AcceleratorError(OTHER_ERROR))
    with pytest.warns(UserWarning, match="could not be captured"):
        model.encode(images(2))
    gpu.fail("instantiate", error=torch.AcceleratorError(OTHER_ERROR))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (3, 2, 3):
            model.encode(images(batch))
    assert model.stats().eager == 4 and model.stats().replays == 0
    model.encode(images(1))
    assert model.stats().replays == 1


def test_a_failed_capture_leaves_no_work_behind(gpu):
    model, x = model_on_gpu(), images(8)
    gpu.fail("instantiate")
    with contextlib.suppress(RuntimeError):
        model.encode(x)
    del model
    torch.empty(1 << 20, device="cuda")


def test_an_arena_of_the_exact_size_is_tried_before_the_batch_is_split(gpu):
    model = model_on_gpu()
    model.encode(images(16))
    small = model.stats().nbytes
    x = images(20)
    before = model.stats()
    # room for the larger arena, not for one twice as large as the first
    gpu.limit = gpu.allocated + small + small // 2
    assert model.encode(x).shape[0] == 20
    after = model.stats()
    assert after.replays - before.replays == 1 and after.evictions == before.evictions


def test_the_limit_of_a_batch_grows_back_when_there_is_memory(gpu):
    model, x = model_on_gpu(), images(16)
    model.encode(x)
    arena = model.stats().nbytes
    model.runtime.clear()
    model.encode(images(1))
    gpu.limit = gpu.allocated + arena // 2

    def parts() -> int:
        before = model.stats().replays
        model.encode(x)
        return model.stats().replays - before

    assert parts() > 1
    gpu.limit = 80 << 30
    assert any(parts() == 1 for _ in range(100))


# streams


def test_captures_stay_off_the_streams_of_others():
    mine = torch.cuda.Stream()
    model = model_on_gpu()
    for i in range(40):
        model.encode(images(1, 8 + 8 * (i % 8), 8 + 8 * (i // 8)))
    assert model.stats().captures == 40
    mine.synchronize()


def test_nothing_is_collected_inside_a_capture(monkeypatch):
    begin = torch.cuda.CUDAGraph.capture_begin

    def begin_beside_garbage(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        # somebody's graph, held by a circle that is not needed any more
        circle = [unneeded.pop()]
        circle.append(circle)

    x, model = images(), model_on_gpu()
    unneeded = [captured(lambda: x.add(1))[0]]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin_beside_garbage)
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        model.encode(x)
    finally:
        gc.set_threshold(*threshold)
    assert not unneeded and model.stats().captures == 1


@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_a_model_is_deleted_while_another_stream_runs_it(where):
    models, x, side = [model_on_gpu()], images(), torch.cuda.Stream()
    models[0].encode(x)
    with torch.cuda.stream(side):
        static = images()
        models[0].encode(static)
    if where == "here":
        models.clear()
    else:
        thread = threading.Thread(target=models.clear)
        thread.start()
        thread.join()
    torch.empty(1 << 20, device="cuda")


# what a trainer sees


def test_release_gives_everything_back(gpu):
    model = model_on_gpu()
    x = images()
    held = torch.cuda.memory_allocated()
    model.decode(model.encode(x), inference_config=ONE_STEP)
    assert torch.cuda.memory_allocated() > held
    model.release()
    assert torch.cuda.memory_allocated() == held
    assert model.encode(x).shape == (2, 4, 2, 1)


def test_cuda_graphs_can_be_left_out(gpu):
    model = model_on_gpu(cuda_graphs=False)
    for _ in range(2):
        model.encode(images())
    assert gpu.counts["instantiate"] == 0 and model.stats().eager == 2


def test_arenas_stay_within_the_budget():
    budget = 40_000
    model = model_on_gpu(memory_budget=budget)
    for batch in (1, 2, 3, 4, 8, 16):
        assert model.encode(images(batch)).shape[0] == batch
        assert model.stats().nbytes <= budget


@pytest.mark.parametrize("num_steps", [1, 10])
def test_out_may_be_made_under_inference_mode(num_steps):
    model, x = model_on_gpu(), images()
    with torch.inference_mode():
        latents, image = torch.empty(2, 4, 2, 1, device="cuda"), torch.empty(2, 3, 16, 8, device="cuda")
    assert model.encode(x, out=latents) is latents
    assert model.decode(latents, inference_config=steps(num_steps), out=image) is image
