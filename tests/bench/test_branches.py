"""The simulation of branches: schedules computed by hand, bounds that none may cross."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import sass
from bench._branches import Work, floor, interleaved, simulate
from bench._gpu_model import CTA_START, GPUS, Cta, schedule

# 8 SMs at 1 GHz: cycles are nanoseconds
GPU = replace(GPUS["h200"], sms=8, ghz=1.0, l2=1e15, dram=1e12, tflops=1e6, gap=0.0)
ALONE = CTA_START + 1000


def launch(programs: int, pipe: str = "tensor", cycles: float = 1000, registers: int = 255, **given) -> Work:
    """CTAs of 8 warps that keep one pipe busy; one fits an SM with 255 registers, two with 128 and three with 80."""
    cta = Cta({"main": {pipe: float(cycles)}}, {"main": 0.0})
    return Work("any", cta, programs, 8, registers, 0, **given)


def ns(*branches: list[Work], mixed: float = 0.0, hiding: float = 0.5) -> float:
    return 1e9 * simulate(branches, GPU, mixed, hiding)


@pytest.mark.parametrize(("programs", "registers", "per_sm"), [(24, 255, 1), (20, 255, 1), (20, 128, 2), (37, 80, 3)])
def test_one_launch_takes_the_time_of_its_grid(programs, registers, per_sm):
    work = launch(programs, registers=registers)
    assert ns([work]) == pytest.approx(schedule(work.cta, programs, per_sm, GPU.sms)[0])


def test_launches_of_a_branch_follow_each_other_with_gaps():
    work = launch(8, gap=100e-9)
    assert ns([work, work, work]) == pytest.approx(3 * (100 + ALONE))


@pytest.mark.parametrize("registers", [255, 80])
def test_branches_share_the_sms_where_neither_fills_them(registers):
    # a CTA goes to an SM that has none, though another has room
    assert ns([launch(4, registers=registers)], [launch(4, registers=registers)]) == pytest.approx(ALONE)


def test_the_second_branch_fills_the_tail_of_the_first():
    # two and a half waves and one and a half are four, where one after the other takes three and two
    assert ns([launch(20)], [launch(12)]) == pytest.approx(4 * ALONE)
    assert ns([launch(20), launch(12)]) == pytest.approx(5 * ALONE)


def test_the_second_branch_waits_though_it_had_room_until_all_of_the_first_are_out():
    # two waves of the first fill half of the registers; those of the second could lie beside both
    first, second = launch(16, registers=168), launch(8, "fma", registers=80)
    assert ns([first], [second], mixed=1) == pytest.approx(2 * ALONE)
    # were they out at once, one wave's time would do
    assert ns([launch(8, registers=168)], [second], mixed=1) == pytest.approx(ALONE)


def test_ctas_of_two_launches_take_turns_or_interleave():
    tensor, fma = launch(8, registers=128), launch(8, "fma", registers=128)
    assert ns([tensor], [fma], mixed=0) == pytest.approx(2 * ALONE)
    assert ns([tensor], [fma], mixed=1) == pytest.approx(ALONE)
    # the same pipe gives each half of what it has: 2 x 1000 cycles, the launch of the CTAs hidden
    assert ns([tensor], [launch(8, registers=128)], mixed=1) == pytest.approx(2000)
    half_way = ns([tensor], [fma], mixed=0.5)
    assert half_way == pytest.approx(1.5 * ALONE)


def test_a_pipe_that_is_full_does_not_stop_what_waits_for_another():
    tensor, issue = Cta({"main": {"tensor": 1000.0}}, {"main": 0.0}), Cta({"main": {"issue": 500.0}}, {"main": 0.0})
    shares = interleaved([(tensor, 2), (issue, 1)])
    assert shares == pytest.approx([1 / 2000, 1 / (CTA_START + 500)])


@pytest.mark.parametrize(("kind", "amount"), [("dram", 1e12), ("l2", 1e15), ("flops", 1e18)])
def test_what_the_whole_gpu_shares_is_shared(kind, amount):
    # 2000 ns of it each, where the SMs would be done in 1350
    work = launch(4, **{kind: amount * 2000e-9})
    assert ns([work]) == pytest.approx(2000)
    assert ns([work], [launch(4, **{kind: amount * 2000e-9})]) == pytest.approx(4000)
    # what does not use it goes on
    assert ns([work], [launch(4), launch(4)]) == pytest.approx(2 * ALONE)


def test_a_launch_that_starts_early_keeps_its_places_idle():
    first, after = launch(4, release=0.5), launch(8, gap=100e-9)
    early = replace(after, early=True)
    assert ns([first, early]) == ns([first, after]) == pytest.approx(2 * ALONE + 100)
    # the other branch has four SMs until 850, when the launch that waits takes them; its second one comes at the end
    other = [launch(4, cycles=500), launch(4)]
    assert ns([first, early], other) == pytest.approx(3 * ALONE + 100)
    # and comes at 850 where none waits, so that half of `after` comes behind it
    assert ns([first, after], other) == pytest.approx(500 + CTA_START + 2 * ALONE)
    # nor does one wait where the launch before lets it start only at its own end
    late = replace(first, release=1.0)
    assert ns([late, early], other) == ns([first, after], other)
    # a launch of two waves lets none start before the second, so that what came meanwhile is first
    assert ns([launch(16, release=0.5), early], [launch(8, gap=1000e-9)]) == pytest.approx(4 * ALONE)


def test_ctas_with_less_to_do_leave_their_places_sooner():
    uneven = launch(8, cycles=13650, short=4, ahead=1 / 14)
    assert ns([uneven]) == pytest.approx(14000)
    assert ns([uneven], [launch(4)]) == pytest.approx(13000 + ALONE)
    assert floor([[uneven]], GPU) == pytest.approx(13650e-9 * (1 - 0.5 / 14))
    # what the whole GPU shares is of the work that there is
    assert ns([replace(uneven, dram=30000e-9 * GPU.dram)]) == pytest.approx(30000)


def test_a_cta_that_fits_no_sm_is_told():
    with pytest.raises(ValueError, match="any fits no SM of H200"):
        simulate([[launch(1, registers=255)], [replace(launch(1), smem=10**6)]], GPU, 0.5)


works = st.builds(
    lambda programs, pipe, cycles, registers, dram, gap, early: launch(
        programs,
        pipe,
        cycles,
        registers,
        dram=dram,
        gap=gap,
        early=early,
        release=0.75,
        short=programs // 3,
        ahead=0.25,
    ),
    st.integers(1, 60),
    st.sampled_from(["tensor", "fma", "issue"]),
    st.integers(200, 5000),
    st.sampled_from([40, 80, 128, 168, 255]),
    st.sampled_from([0.0, 1e5, 5e6]),
    st.sampled_from([0.0, 1e-7]),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(works, min_size=1, max_size=4), st.lists(works, min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.0])
)
def test_no_schedule_beats_its_resources(first, second, mixed):
    both = simulate([first, second], GPU, mixed)
    assert both >= floor([first, second], GPU) * (1 - 1e-6)
    # nor a branch itself alone, where nothing of another is in its way, by more than the taking together of SMs
    alone = max(simulate([branch], GPU, mixed) for branch in (first, second))
    assert both >= 0.8 * alone


@settings(max_examples=30, deadline=None)
@given(works, st.integers(1, 20))
def test_more_takes_no_less(work, more):
    # memory left out: what is left of it at the end of a launch goes to fewer CTAs
    work = replace(work, dram=0.0, short=0)
    time = simulate([[work]], GPU, 0.5)
    assert simulate([[replace(work, programs=work.programs + more)]], GPU, 0.5) >= time * (1 - 1e-6)
    assert simulate([[work]], replace(GPU, sms=16), 0.5) <= time * (1 + 1e-6)


def test_calls_of_two_branches():
    call = sass.CallName.parse("encode:128:256:gluon:overlap:early")
    assert str(call) == "encode 128x256² expand=gluon overlap early" and call.overlap and call.early
    assert not sass.CallName.parse("encode:128:256").overlap
    with pytest.raises(argparse.ArgumentTypeError, match="only an even batch has halves"):
        sass.CallName.parse("encode:1:256:overlap")
