"""Instructions are counted as warps execute them: through loops, past branches, by the block that arrives last."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import ptx_counts  # noqa: E402

sys.path.remove(BENCHMARKS)

PARAMETERS = ".param .u64 .ptr k_param_0, .param .u32 k_param_1"


def executed(
    body: str, n: int = 0, grid: tuple[int, int, int] = (1, 1, 1), warps: int = 2
) -> float:
    ptx = f".version 8.0\n.visible .entry k({PARAMETERS})\n.maxntid 64\n{{ .reg .b32 %r<9>;\n{body}\n}}"
    about: dict[str, Any] = {
        "entry": "k",
        "grid": list(grid),
        "block": [32 * warps, 1, 1],
        "parameters": [
            {"name": "p", "kind": "pointer", "role": "scratch"},
            {"name": "n", "kind": "scalar", "dtype": "int32", "value": n},
        ],
    }
    return ptx_counts.instructions(ptx, about)


LOOP = """
    ld.param.u32 %r1, [k_param_1];
    mov.u32 %r2, 0;
$L1:
    add.s32 %r2, %r2, 1; // a comment; with a semicolon
    setp.lt.s32 %p1, %r2, %r1;
    @%p1 bra $L1;
    ret;"""


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_loop_is_counted_as_often_as_it_runs(n: int) -> None:
    assert executed(LOOP, n) == 2 * (2 + 3 * n + 1)


def test_warps_that_go_elsewhere_do_not_execute() -> None:
    body = """
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    setp.ne.s32 %p1, %r2, 0;
    @%p1 bra $L1;
    add.s32 %r3, %r1, 1;
    add.s32 %r3, %r3, 1;
$L1:
    ret;"""
    assert executed(body) == 2 * 5 + 2  # the first warp's two additions


def test_lanes_that_go_elsewhere_cost_their_warp() -> None:
    body = """
    mov.u32 %r1, %laneid;
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra $L1;
    add.s32 %r3, %r1, 1;
    bra.uni $L2;
$L1:
    add.s32 %r3, %r1, 2;
$L2:
    ret;"""
    assert executed(body, warps=1) == 3 + 2 + 1 + 1


LAST = """
    ld.param.u64 %rd1, [k_param_0];
    ld.param.u32 %r1, [k_param_1];
    mov.u32 %r2, %tid.x;
    mov.u32 %r7, %ctaid.x;
    mul.wide.u32 %rd2, %r7, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.ne.s32 %p1, %r2, 0;
    @%p1 bra $L1;
    atom.global.add.u32 %r3, [%rd3], 1;
    st.shared.u32 [flag], %r3;
$L1:
    bar.sync 0;
    ld.shared.u32 %r4, [flag];
    add.s32 %r5, %r1, -1;
    setp.ne.s32 %p2, %r4, %r5;
    @%p2 bra $L2;
    mov.u32 %r6, 0;
$L3:
    add.s32 %r6, %r6, 1;
    setp.lt.s32 %p3, %r6, %r1;
    @%p3 bra $L3;
$L2:
    ret;"""


def test_the_last_of_each_tile_adds_up() -> None:
    tiles, slices = 3, 4
    found = executed(LAST, n=slices, grid=(tiles, 1, slices))
    every, arrival, adds = 2 * (8 + 5 + 1), 2, 2 * (1 + 3 * slices)
    assert found == every + arrival + adds / slices


def test_a_loop_that_ends_on_data_is_an_error() -> None:
    body = LOOP.replace("ld.param.u32 %r1, [k_param_1]", "ld.global.u32 %r1, [%rd1]")
    with pytest.raises(ptx_counts.UnknownWay, match="a loop that ends on what is not known: @%p1"):
        executed(body)


def test_a_branch_on_data_skips_what_it_can() -> None:
    body = """
    ld.global.u32 %r1, [%rd1];
    setp.eq.s32 %p1, %r1, 0;
    @%p1 bra $L1;
    add.s32 %r2, %r1, 1;
$L1:
    ret;"""
    assert executed(body) == 2 * 4


def test_what_is_waited_for_is_there_at_once() -> None:
    body = """
    { .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], 0;
    @!complete bra.uni waitLoop; }
    ret;"""
    assert executed(body) == 2 * 3


def test_waiting_for_other_launches_is_an_instruction() -> None:
    assert executed("griddepcontrol.launch_dependents; griddepcontrol.wait; ret;") == 2 * 3
