"""Random sequences of what users do to a model on a GPU: a call succeeds or raises an error of ours, and nothing else.

    python tests/runtime/on_fake_device/random_calls.py --sequences 2000 --seed 1

A sequence is one process' life: calls of many shapes on several streams and threads, edits in place, moves, casts,
evictions, captures by the caller, memory that runs out, release and deletion. Its number is all that it depends on.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    here = Path(__file__).resolve()
    sys.path[:0] = [str(here.parents[1]), str(here.parents[2] / "support")]
    import fake_cuda

    fake_cuda.install()

import torch
from fake_gpu import gpu
from fake_triton import forget_kernels
from runtime_cases import tiny

from capacitor_rt import FullCapacitorInferenceConfig
from capacitor_rt.config import DicoConfig
from capacitor_rt.errors import InputError
from capacitor_rt.runtime import weights

SIZES = ((8, 8), (16, 8), (16, 16), (24, 8), (32, 32))
BATCHES = (1, 2, 3, 4, 5)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IMAGE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
ARCHITECTURES = (80, 89, 90, 100, 120)
STREAMS = (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream())
# few, so that decoders are evicted, and steps folded one by one, at a cost that allows thousands of sequences
weights.MAX_TIMES = 3


class Sequence:
    """One user's session."""

    def __init__(self, number: int):
        self.random = random.Random(number)
        self.log: list[str] = []
        self.errors = Counter[str]()
        self.graphs: list[tuple[torch.cuda.CUDAGraph, Any]] = []
        forget_kernels()
        gpu.reset(self.random.choice(ARCHITECTURES), limit=gpu.allocated + (1 << 30))
        torch.cuda.set_stream(torch.cuda.default_stream())
        self.model = self.new_model()

    def run(self, length: int) -> None:
        """So many random actions, then the end of everything."""
        actions: dict[Callable[[], None], int] = {
            self.call: 10,
            self.edit: 2,
            self.move: 1,
            self.cast: 1,
            self.settings: 1,
            self.capture: 3,
            self.replay: 3,
            self.starve: 4,
            self.stay_short: 1,
            self.fail_otherwise: 1,
            self.threads: 1,
            self.replace: 1,
            self.copy: 1,
        }
        for action in self.random.choices([*actions], [*actions.values()], k=length):
            self.log.append(action.__name__)
            action()
            self.check()
        self.end()
        self.check()

    def check(self) -> None:
        assert not gpu.faults, f"{gpu.faults} after {self.log}"

    def end(self) -> None:
        """Everything goes, and its memory comes back."""
        self.log.append("end")
        self.forget_graphs()
        self.own_parameters()
        del self.model
        gpu.settle()

    def new_model(self) -> Any:
        budget = self.random.choice((None, None, 1, 20_000, 100_000))
        dtype, graphs = self.random.choice(DTYPES), self.random.random() < 0.9
        overlap = self.random.random() < 0.3
        changes: dict[str, Any] = {}
        if self.random.random() < 0.25:
            changes["dico"] = DicoConfig("mdiffae_v2")
        self.log.append(f"model {dtype} cuda_graphs={graphs} overlap={overlap} memory_budget={budget} {changes}")
        return tiny(device="cuda", dtype=dtype, cuda_graphs=graphs, overlap=overlap, memory_budget=budget, **changes)

    def new_call(self, drawing: bool = True) -> Callable[[], Any]:
        """A random call of the model, with inputs of the current stream; `drawing` noise of a seed, or given all."""
        pick = self.random.choice
        batch, (height, width) = pick(BATCHES), pick(SIZES)
        what, out = pick(("encode", "posterior", "decode", "decode")), self.random.random() < 0.3
        model = self.model
        if what != "decode":
            dtype, nhwc = pick(IMAGE_DTYPES), self.random.random() < 0.3
            shape = (batch, height, width, 3) if nhwc else (batch, 3, height, width)
            image = torch.zeros(shape).to(dtype).to("cuda")
            self.log.append(f"{what} {dtype} {shape} out={out}")
            if what == "posterior":
                return lambda: model.encode_posterior(image)
            target = torch.empty(batch, 4, height // 8, width // 8, device="cuda") if out else None
            return lambda: model.encode(image, out=target)
        steps, sampler = pick((1, 1, 2, 3, 4)), pick(("ddim", "dpmpp_2m"))
        drawn = pick((None, 0, 1)) if drawing else None
        drop = pick(model.config.drops)
        inference = FullCapacitorInferenceConfig(steps, sampler, pdg=pick((False, True)), seed=drawn, pdg_drop=drop)
        latents = torch.zeros(batch, 4, height // 8, width // 8, device="cuda")
        shape = (batch, 3, height, width)
        noise = torch.zeros(shape, device="cuda") if drawn is None else None
        target = torch.empty(shape, device="cuda") if out else None
        self.log.append(f"decode {shape} {inference} out={out}")
        given = {"noise": noise, "out": target}
        if inference.pdg and drop == "tokens" and drawn is None:
            given["dropped"] = torch.zeros(batch, 1, height // 8, width // 8, device="cuda")
        return lambda: model.decode(latents, inference_config=inference, **given)

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Whether a call succeeded; errors of ours are fine, all others end the sequence."""
        try:
            call()
        except InputError as error:
            self.errors[str(error)[:30]] += 1
            self.log.append(f"-> {type(error).__name__}")
            return False
        return True

    def own_parameters(self) -> None:
        """What torch asks of everybody who frees tensors that other streams read."""
        for t in self.model.state_dict().values():
            for stream in STREAMS if t.is_cuda else ():
                t.record_stream(stream)

    def elsewhere(self) -> torch.cuda.Stream:
        return self.random.choice(STREAMS)

    # actions

    def call(self) -> None:
        with torch.cuda.stream(self.elsewhere()):
            call = self.new_call()
            for _ in range(self.random.choice((1, 1, 2))):
                assert self.attempt(call), f"a plain call failed after {self.log}"

    def edit(self) -> None:
        torch.cuda.synchronize()
        with torch.no_grad():
            self.random.choice([*self.model.parameters()]).mul_(0.5)
        torch.cuda.synchronize()

    def move(self) -> None:
        with torch.cuda.stream(self.elsewhere()):
            self.own_parameters()
            self.model.cpu()
            self.model.cuda()
            torch.cuda.synchronize()

    def cast(self) -> None:
        self.own_parameters()
        self.model.to(self.random.choice(DTYPES))
        torch.cuda.synchronize()

    def settings(self) -> None:
        if self.random.random() < 0.5:
            self.model.low_latency = not self.model.low_latency
            return
        with torch.cuda.stream(self.elsewhere()):
            self.model.release()

    def capture(self) -> None:
        """By the caller: of what has run, or for all that he knows."""
        with torch.cuda.stream(self.elsewhere()):
            call = self.new_call(drawing=self.random.random() < 0.2)
            torch.cuda.synchronize()
            if self.random.random() < 0.7:
                assert self.attempt(call), f"a plain call failed after {self.log}"
            if self.random.random() < 0.1:
                gpu.fail("allocate", self.random.randrange(3))
            graph, result = torch.cuda.CUDAGraph(), []
            with ExitStack() as stack:
                stack.enter_context(torch.cuda.graph(graph))
                captured = self.attempt(lambda: result.append(call()))
            gpu.failures.clear()
            if captured:
                self.graphs.append((graph, (call, result)))
            # what it made is not there before a replay, and none of this call's
            self.attempt(call)

    def replay(self) -> None:
        if self.graphs:
            torch.cuda.synchronize()
            with torch.cuda.stream(self.elsewhere()):
                self.random.choice(self.graphs)[0].replay()
            torch.cuda.synchronize()

    def starve(self) -> None:
        """Memory runs out once, somewhere in a call."""
        with torch.cuda.stream(self.elsewhere()):
            call = self.new_call()
            kind = self.random.choice(("allocate", "allocate", "load", "instantiate"))
            gpu.fail(kind, self.random.choice((0, 0, 1, 2, 5, 20)))
            self.log.append(f"{kind} fails after {gpu.failures[kind][0]}")
            self.attempt(call)
            gpu.failures.clear()
            assert self.attempt(call), f"there is memory again, after {self.log}"

    def stay_short(self) -> None:
        """Little memory is free for a few calls."""
        with torch.cuda.stream(self.elsewhere()):
            calls = [self.new_call() for _ in range(3)]
            limit, gpu.limit = gpu.limit, gpu.allocated + self.random.choice((0, 1 << 12, 1 << 16, 1 << 18))
            self.log.append(f"{gpu.limit - gpu.allocated} bytes are free")
            for call in calls:
                self.attempt(call)
            gpu.limit = limit
            assert self.attempt(calls[-1]), f"there is memory again, after {self.log}"

    def fail_otherwise(self) -> None:
        """A graph cannot be instantiated, for whatever reason."""
        with torch.cuda.stream(self.elsewhere()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            call = self.new_call()
            gpu.fail("instantiate", error=torch.AcceleratorError("CUDA error: operation not supported"))
            assert self.attempt(call), f"a call failed with its capture after {self.log}"
            gpu.failures.clear()

    def threads(self) -> None:
        """Each on a stream of its own, all with one model."""
        failures: list[BaseException] = []

        def work(calls: list[Callable[[], Any]], stream: torch.cuda.Stream) -> None:
            try:
                with torch.cuda.stream(stream):
                    for call in calls:
                        call()
            except BaseException as error:
                failures.append(error)

        torch.cuda.synchronize()
        workers = []
        for stream in STREAMS[1:]:
            with torch.cuda.stream(stream):
                calls = [self.new_call() for _ in range(3)]
            workers.append(threading.Thread(target=work, args=(calls, stream)))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]
        torch.cuda.synchronize()

    def replace(self) -> None:
        """A model goes, while others' streams may still run it."""
        self.forget_graphs()
        with torch.cuda.stream(self.elsewhere()):
            self.own_parameters()
            del self.model
            torch.empty(1 << 12, device="cuda")
        self.model = self.new_model()

    def copy(self) -> None:
        self.forget_graphs()
        torch.cuda.synchronize()
        self.own_parameters()
        self.model = copy.deepcopy(self.model)
        torch.cuda.synchronize()

    def forget_graphs(self) -> None:
        """What a caller's graph reads is the caller's to wait for."""
        if self.graphs:
            torch.cuda.synchronize()
            self.graphs.clear()


def run(sequences: int, seed: int, length: int = 10) -> Counter[str]:
    """Run sequences of random actions; returns how often which error of ours was raised.

    Raises:
        AssertionError: of the first sequence that went wrong, with its number and what it did.
    """
    errors = Counter[str]()
    for number in range(seed * 1_000_000, seed * 1_000_000 + sequences):
        before = gpu.allocated
        sequence = Sequence(number)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "image has values")
                # only `fail_otherwise` makes captures fail
                warnings.filterwarnings("error", ".*could not be captured")
                sequence.run(length)
        except Exception as error:
            raise AssertionError(f"sequence {number}: {sequence.log}") from error
        errors += sequence.errors
        log = sequence.log
        del sequence
        assert gpu.allocated == before, f"{gpu.allocated - before} bytes were lost by sequence {number}: {log}"
    return errors


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=2000, help="number of sequences to run")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--length", type=int, default=10, help="actions per sequence")
    args = parser.parse_args()
    started = time.perf_counter()
    errors = run(args.sequences, args.seed, args.length)
    print(f"{args.sequences} sequences in {time.perf_counter() - started:.1f} s, no fault; errors of ours:")
    for message, n in errors.most_common():
        print(f"{n:6}  {message}")


if __name__ == "__main__":
    main()
