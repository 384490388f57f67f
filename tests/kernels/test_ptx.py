"""The compiled kernels without a GPU, in an emulator of the PTX that Triton emits.

They have the bits of the reference, and access only their tensors, aligned. ``test_triton.py``
interprets the same cases before compilation. The emulator does not show what ptxas does to the PTX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from . import ptx_launch, triton_checks
from .processes import pool
from .ptx_emulator import Kernel, LaunchError, launch
from .ptx_instructions import OPERATIONS, TYPES
from .ptx_memory import Memory

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Run]:
    """Call a module-level function in a process where Triton compiles, even if not in this one."""
    with pool("0") as process:
        yield lambda function, *args: process.submit(function, *args).result()


# ----------------------------------------------------------------------------------- the kernels


TOGETHER, BY_WARP = False, True
CASES = [
    *[(name, "sm_90", TOGETHER) for name in triton_checks.CASES],
    *[(name, "sm_90", BY_WARP) for name in ("bf16", "grad_scale", "unaligned")],
    *[
        (name, "sm_80", TOGETHER)
        for name in ("bf16", "fp32", "grad_scale", "unaligned fp32 gradients")
    ],
]


@pytest.mark.parametrize(("name", "target", "by_warp"), CASES)
def test_same_bits_as_the_reference(elsewhere: Run, name: str, target: str, by_warp: bool) -> None:
    assert elsewhere(ptx_launch.differences, name, target, by_warp) == []


def test_offsets_beyond_32_bits(elsewhere: Run) -> None:
    assert elsewhere(ptx_launch.differences_beyond_32_bits, "sm_90") == []


@pytest.mark.parametrize(
    ("target", "by_warp"),
    [
        ("sm_90", BY_WARP),
        pytest.param("sm_80", TOGETHER, marks=pytest.mark.exhaustive),
    ],
)
def test_norm_and_clip(elsewhere: Run, target: str, by_warp: bool) -> None:
    pairs = elsewhere(ptx_launch.norms, target, by_warp)
    assert {name: found for name, (found, _) in pairs.items()} == {
        name: wanted for name, (_, wanted) in pairs.items()
    }


def test_norm_bits_do_not_depend_on_program_order(elsewhere: Run) -> None:
    *found, wanted = elsewhere(ptx_launch.norms_of_one_model, "sm_90")
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(wanted, rel=1e-13)


# ---------------------------------------------------------------------------------- the emulator


@pytest.mark.parametrize(
    ("opcode", "sources", "wanted"),
    [
        # the NaN of single precision, in two cases
        ("add.rn.f32", [0x7F800000, 0xFF800000], 0x7FFFFFFF),
        ("add.rn.f32", [0xFFC01234, 0x3F800000], 0x7FFFFFFF),
        ("add.rn.f32", [0x3F800000, 0x33800000], 0x3F800000),  # a tie
        ("mul.rn.f32", [0x00800000, 0x3F000000], 0x00400000),  # subnormals stay
        ("div.rn.f32", [0x3F800000, 0x40400000], 0x3EAAAAAB),
        ("div.rn.f32", [0x00000003, 0x40000000], 0x00000002),
        ("sqrt.rn.f32", [0x40000000], 0x3FB504F3),
        ("sqrt.rn.f32", [0x00000001], 0x1A3504F3),
        ("sqrt.rn.f32", [0xBF800000], 0x7FFFFFFF),
        ("neg.f32", [0x80000000], 0x00000000),
        ("cvt.rn.bf16.f32", [0x3F808000], 0x3F80),
        ("cvt.rn.bf16.f32", [0x3F818000], 0x3F82),
        ("cvt.rn.bf16.f32", [0x00018000], 0x0002),
        ("cvt.rn.bf16.f32", [0xFF7FFFFF], 0xFF80),
        ("cvt.rn.bf16.f32", [0xFF800001], 0x7FFF),
        ("cvt.rn.bf16x2.f32", [0x3F800000, 0x40000000], 0x3F804000),  # the first goes high
        # just above half of the smallest subnormal
        ("cvt.rn.f32.f64", [0x3690000000000001], 0x00000001),
        ("cvt.rzi.s32.f32", [0xBFC00000], 0xFFFFFFFF),
        ("cvt.rzi.s32.f32", [0x4F800000], 0x7FFFFFFF),
        ("cvt.rzi.s32.f32", [0x7FC00000], 0),
        ("cvt.s64.s32", [0x80000000], 0xFFFFFFFF80000000),
        ("cvt.u64.u32", [0x80000000], 0x80000000),
        ("cvt.u32.u64", [0x1234567890ABCDEF], 0x90ABCDEF),
        (
            "fma.rn.f64",
            [0x3FF0000020000000, 0x3FF0000020000000, 0xBFF0000040000000],
            0x3D10000000000000,
        ),
        ("min.s32", [0x7FFFFFFF, 0x7FFF0000], 0x7FFF0000),
        ("min.s32", [0xFFFFFFFF, 0x7FFF0000], 0xFFFFFFFF),
        ("mul.lo.s16", [0x1234, 0xC09D], 0x29E4),
        ("mul.wide.u16", [0xFFFF, 0xFFFF], 0xFFFE0001),
        ("mul.wide.s32", [0xFFFFFFFF, 2], 0xFFFFFFFFFFFFFFFE),
        ("mad.wide.u32", [0xFFFFFFFF, 2, 1], 0x1FFFFFFFF),
        ("shl.b32", [1, 32], 0),
        ("shl.b64", [1, 63], 1 << 63),
        ("shr.u32", [0x80000000, 40], 0),
        ("shr.s32", [0x80000000, 40], 0xFFFFFFFF),
        ("bfe.u32", [0x12345678, 8, 8], 0x56),
        ("prmt.b32", [0x11112222, 0x33334444, 0x7632], 0x33331111),
        ("setp.gt.u32", [0x80000000, 1], 1),
        ("setp.lt.s32", [0x80000000, 1], 1),
        ("setp.eq.f64", [0x7FF8000000000000, 0x7FF8000000000000], 0),
        ("selp.f32", [0x7F800001, 0, 1], 0x7F800001),  # a move keeps the payload
    ],
)
def test_operations(opcode: str, sources: list[int], wanted: int) -> None:
    result, types, function = OPERATIONS[opcode]
    values = []
    for bits, t in zip(sources, types, strict=True):
        size = np.dtype(TYPES[t]).itemsize
        values.append(np.frombuffer(bits.to_bytes(size, "little") * 2, TYPES[t]))
    with np.errstate(all="ignore"):
        found = function(*values)
    assert found.dtype == TYPES[result]
    assert [int.from_bytes(x.tobytes(), "little") for x in found] == [wanted] * 2


def run(body: str, *arrays: np.ndarray, by_warp: bool = False, programs: int = 1) -> None:
    """Run a kernel of 64 threads. ``%rd0`` is the first of the arrays, ``%r0`` the thread."""
    parameters = ", ".join(
        f".param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(len(arrays))
    )
    ptx = f"""
.visible .entry kernel({parameters})
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd0, [kernel_param_0];
	mov.u32 	%r0, %tid.x;
{body}
	ret;
}}"""
    memory = Memory([(x.ctypes.data, x.nbytes) for x in arrays])
    addresses = [x.ctypes.data for x in arrays]
    launch(
        Kernel(ptx, 256),
        programs,
        addresses,
        memory,
        by_warp=by_warp,
        generator=np.random.default_rng(0),
    )


STORE = """
	mad.wide.u32 	%rd1, %r0, 4, %rd0;
	st.global.b32 	[%rd1], %r1;
"""
LOOP = """
	setp.lt.u32 	%p1, %r0, 40;
	mov.b32 	%r1, 0;
	@%p1 bra 	$L2;
$L1:
	add.s32 	%r1, %r1, 3;
	setp.lt.u32 	%p2, %r1, %r0;
	@%p2 bra 	$L1;
	bra.uni 	$L3;
$L2:
	add.s32 	%r1, %r0, 1000;
$L3:
	shfl.sync.bfly.b32 	%r1, %r1, 1, 31, -1;
"""
EXCHANGE = """
	shl.b32 	%r2, %r0, 2;
	st.shared.b32 	[%r2], %r0;
	{barrier}
	xor.b32 	%r2, %r2, 252;
	ld.shared.b32 	%r1, [%r2];
"""


@pytest.mark.parametrize("by_warp", [False, True])
def test_threads_diverge_and_reconverge(by_warp: bool) -> None:
    out = np.zeros(64, np.uint32)
    run(LOOP + STORE, out, by_warp=by_warp)
    wanted = [1000 + i if i < 40 else -(-i // 3) * 3 for i in range(64)]
    assert out.tolist() == [wanted[i ^ 1] for i in range(64)]


@pytest.mark.parametrize("by_warp", [False, True])
def test_barrier_orders_shared_memory(by_warp: bool) -> None:
    out = np.zeros(64, np.uint32)
    run(EXCHANGE.format(barrier="bar.sync 0;") + STORE, out, by_warp=by_warp)
    assert out.tolist() == list(range(64))[::-1]


def test_atomic_adds_of_all_programs_count() -> None:
    out = np.zeros(1, np.uint32)
    add_two = "mov.b32 %r1, 2;\natom.global.gpu.acq_rel.add.u32 %r2, [%rd0], %r1;"
    run(add_two, out, programs=3)
    assert out.tolist() == [2 * 64 * 3]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "mad.wide.u32 %rd1, %r0, 4, %rd0;\nst.global.b32 [ %rd1 + 4 ], { %r0 };",
            "are in no tensor",
        ),
        ("ld.global.b32 %r1, [%rd0+-4];", "are in no tensor"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", "is not a multiple of 16"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+256];", "16 bytes at .* are in no tensor"),
        (EXCHANGE.format(barrier=""), "never written"),
        ("mov.b32 %r1, 256;\nst.shared.b32 [%r1], %r0;", "in shared memory"),
        (
            "setp.lt.u32 %p1, %r0, 9;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:",
            "threads wait at different barriers",
        ),
        ("st.global.b32 [%rd0], %r0;", "different values"),
        (
            "setp.lt.u32 %p1, %r0, 9;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
            "only a part of a warp",
        ),
    ],
)
def test_illegal_launch_raises(body: str, message: str) -> None:
    out = np.zeros(256 + 16, np.uint8)
    out = out[-out.ctypes.data % 16 :][:256].view(np.uint32)
    with pytest.raises(LaunchError, match=message):
        run(body, out, by_warp=True)


TAKE_TICKET = """
	setp.eq.b32 	%p1, %r0, 0;
	mov.b32 	%r2, 1;
	@%p1 atom.global.gpu.acq_rel.add.u32 %r1, [%rd0], %r2;
	@%p1 st.shared.b32 [global_smem], %r1;
	bar.sync 	0;
	ld.shared.b32 	%r1, [global_smem];
	mov.u32 	%r3, %nctaid.x;
	add.s32 	%r3, %r3, -1;
	setp.ne.b32 	%p2, %r1, %r3;
"""
READ = "ld.global.b32 	%r4, [%rd0+4];\n"
WRITE = "	setp.eq.b32 	%p3, %r0, 63;\n@%p3 st.global.b32 	[%rd0+4], %r2;\n"
LAST = "@%p2 bra $L1;\n"
BARRIER = "bar.sync 	0;\n"
END = "$L1:"


@pytest.mark.parametrize(
    ("body", "ordered"),
    # three programs: their threads read, take a ticket, and the last one writes
    [
        # as adamw_kernel increments the steps
        (READ + BARRIER + TAKE_TICKET + LAST + WRITE + END, True),
        # threads of other warps may read after the ticket is taken
        (READ + TAKE_TICKET + LAST + WRITE + END, False),
        (READ + BARRIER + TAKE_TICKET + WRITE, False),
        (TAKE_TICKET + WRITE.replace("63", "0") + LAST + END, False),
        # all programs write
        (WRITE.replace("63", "0").replace("%r2", "%r0") + TAKE_TICKET + LAST + END, False),
        (READ + WRITE, False),
        (READ, True),
    ],
)
def test_races(body: str, ordered: bool) -> None:
    out = np.zeros(64, np.uint32)
    if ordered:
        run(body, out, by_warp=True, programs=3)
    else:
        with pytest.raises(LaunchError, match="nothing orders"):
            run(body, out, by_warp=True, programs=3)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.f32 %r1, %r2, %r3",  # which ptxas may fuse
        "fma.rn.f32 %r1, %r2, %r3, %r4",
        "mul.rn.ftz.f32 %r1, %r2, %r3",
        "sqrt.approx.f32 %r1, %r2",
        "div.full.f32 %r1, %r2, %r3",
        "ld.global.nc.b32 %r1, [%rd0]",
        "ld.global.b32 %rd1, [%rd0]",  # a register of another width
        "shfl.sync.bfly.b32 %r1, %r2, 1, 30, -1",
        "bar.sync 1",
        "@%p1 bar.sync 0",
        "mov.u32 %r1, %laneid",
    ],
)
def test_unknown_instruction_is_refused(instruction: str) -> None:
    out = np.zeros(64, np.uint32)
    run("bra $L1;\nadd.rn.f32 %r1, %r2, %r3;\n$L1:", out)  # a known instruction at that place
    with pytest.raises(NotImplementedError):
        run(f"bra $L1;\n{instruction};\n$L1:", out)
