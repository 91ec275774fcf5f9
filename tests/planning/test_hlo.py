"""What a compiled program needs, collectives and computes, read from texts of it."""

import jax
import jax.numpy as jnp
import pytest
from support.mesh_cases import mesh_of

from spiel_jax.planning.hlo import _refused, collectives, product_flops, reported_memory, shape_bytes

GIB = 2**30

HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%spread_over.1 (p: bf16[4,16]) -> bf16[32,16] {
  %p = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=3, dimensions={0}
}

%spread_over.2 (p.1: bf16[4,16]) -> bf16[32,16] {
  %p.1 = bf16[4,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=3, dimensions={0}
}

%inner_condition (i: (s32[], f32[64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %i = (s32[]{:T(128)}, f32[64]{0:T(1024)}) parameter(0)
  %number = s32[]{:T(128)} get-tuple-element(%i), index=0
  ROOT %less = pred[]{:T(512)} compare(%number, %limit), direction=LT
}

%inner (a: (s32[], f32[64])) -> (s32[], f32[64]) {
  %a = (s32[]{:T(128)}, f32[64]{0:T(1024)}) parameter(0)
  %number.1 = s32[] get-tuple-element(%a), index=0
  %whole = f32[64]{0} get-tuple-element(%a), index=1
  %part = f32[8]{0} reduce-scatter(%whole), channel_id=4, dimensions={0}, to_apply=%add
  ROOT %next = (s32[], /*index=1*/f32[64]{0}) tuple(%number.1, %whole)
}

%unknown_condition (b: (s32[], s32[])) -> pred[] {
  %b = (s32[], s32[]) parameter(0)
  %low = s32[] get-tuple-element(%b), index=0
  %high = s32[] get-tuple-element(%b), index=1
  ROOT %less.1 = pred[] compare(%low, %high), direction=LT
}

%unknown (c: (s32[], s32[])) -> (s32[], s32[]) {
  %c = (s32[], s32[]) parameter(0)
  %low.1 = s32[] get-tuple-element(%c), index=0
  %all-reduce.3 = s32[] all-reduce(%low.1), channel_id=8, to_apply=%add
  ROOT %again = (s32[], s32[]) tuple(%all-reduce.3, %low.1)
}

%body (q: (s32[], f32[64])) -> (s32[], f32[64]) {
  %q = (s32[], f32[64]{0}) parameter(0)
  %slice = bf16[4,16]{1,0} constant({...})
  %first = bf16[32,16]{1,0} fusion(%slice), kind=kCustom, calls=%spread_over.1
  %second = bf16[32,16]{1,0} fusion(%slice), kind=kCustom, calls=%spread_over.2
  %loop = (s32[], f32[64]{0}) while(%q), condition=%inner_condition, body=%inner
  ROOT %out = (s32[], f32[64]{0}) tuple(%loop)
}

%condition (r: (s32[], f32[64])) -> pred[] {
  ROOT %r = (s32[], f32[64]{0}) parameter(0)
}

%little (u: f32[8]) -> f32[8] {
  %u = f32[8]{0} parameter(0)
  ROOT %moved = f32[8]{0} collective-permute(%u), channel_id=5, source_target_pairs={{0,1}}
}

%much (v: f32[8]) -> f32[8] {
  %v = f32[8]{0} parameter(0)
  %begun = (f32[8]{0}, f32[64]{0}) all-gather-start(%v), channel_id=6, dimensions={0}
  %ended = f32[64]{0} all-gather-done(%begun)
  ROOT %cut = f32[8]{0} slice(%ended), slice={[0:8]}
}

%compared (n: s32[]) -> pred[] {
  %n = s32[] parameter(0)
  %seven = s32[] constant(7)
  ROOT %less.2 = pred[] compare(%n, %seven), direction=LT
}

%fused_condition (d: (s32[], f32[64])) -> pred[] {
  %d = (s32[], f32[64]{0}) parameter(0)
  %number.2 = s32[] get-tuple-element(%d), index=0
  ROOT %less.3 = pred[] fusion(%number.2), kind=kLoop, calls=%compared
}

%spread_over.3 (p.2: bf16[4,16]) -> bf16[32,16] {
  %p.2 = bf16[4,16]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[32,16]{1,0} all-gather(%p.2), channel_id=9, dimensions={0}
}

%fused_body (e: (s32[], f32[64])) -> (s32[], f32[64]) {
  %e = (s32[], f32[64]{0}) parameter(0)
  %slice.1 = bf16[4,16]{1,0} constant({...})
  %begun.2 = ((bf16[4,16]{1,0}), bf16[32,16]{1,0}) fusion-start(%slice.1), kind=kCustom, calls=%spread_over.3
  %ended.2 = bf16[32,16]{1,0} fusion-done(%begun.2)
  ROOT %out.1 = (s32[], f32[64]{0}) tuple(%e)
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0), metadata={op_name="state.params['a (b'].x"}
  %begun.1 = f32[8]{0} all-reduce-start(%w), channel_id=1, to_apply=%add, metadata={op_name="jit(f)/sum"}
  %ended.1 = f32[8]{0} all-reduce-done(%begun.1)
  %start = (s32[], f32[64]{0}) tuple()
  %layers = (s32[], f32[64]{0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %search = (s32[], s32[]) while(%start), condition=%unknown_condition, body=%unknown
  %fused = (s32[], f32[64]{0}) while(%start), condition=%fused_condition, body=%fused_body
  ROOT %either = f32[8]{0} conditional(%w, %w, %w), branch_computations={%little, %much}
}
"""  # noqa: E501


def test_exchanges_of_a_program_by_hand():
    found = [(one.kind, one.count, one.bytes) for one in collectives(HLO)]
    assert found == [
        ("all-reduce", 1, 32),
        ("all-gather", 3, 2 * 32 * 16),  # in two fusions, on one channel
        ("reduce-scatter", 15, 4 * 64),  # what goes in
        ("all-reduce", 1, 4),  # in a loop of unknown length
        ("all-gather", 7, 2 * 32 * 16),  # its start is a fusion, as the loop's condition is
        ("all-gather", 1, 4 * 64),  # the branch that collectives more
    ]
    assert collectives(HLO)[0].source == "jit(f)/sum"
    assert collectives(HLO)[1].shape == "bf16[32,16]"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("pred[3]{0}", 3),
        ("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/s64[2]{0:S(4)}, token[])", 28),
        ("u4[8]{0}", 4),
        ("f8e4m3fn[5]", 5),
        ("c64[2]", 16),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


def test_products_of_a_program_by_hand():
    def function(x, w):
        def layer(x, w):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), None

        return jax.lax.scan(jax.checkpoint(layer), x, w)[0].sum()

    x, w = jnp.zeros((2, 8)), jnp.zeros((3, 8, 8))
    assert product_flops(jax.jit(function).trace(x, w).jaxpr) == 3 * 2 * (2 * 2 * 8 * 8)
    spread = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh_of(1, 4, 2), in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp")
    )
    assert product_flops(jax.make_jaxpr(spread)(jnp.zeros((8, 16)))) == 8 * (2 * 2 * 2 * 16)


def test_a_compilers_report_is_read(tmp_path):
    assert reported_memory(tmp_path) is None
    (tmp_path / "module.f.after-memory-usage-report.txt").write_text(
        "Memory Space: default (color=0)\n"
        "Total bytes: 3000 (2.93KiB)\n"
        "  cumulative_size;       size;       offset; used_by_n_values; shapes_list\n"
        "  ------------------------------------------------------------\n"
        "    2.00KiB(100%);    2.00KiB;            0;                1; f32[512]\n"
        "\n"
        "  cumulative_size;       size;       offset; used_by_n_values; shapes_list\n"
        "  ------------------------------------------------------------\n"
        "    1.50KiB( 75%);    1.50KiB;            0;                2; 2×f32[384]\n"  # noqa: RUF001
        "    2.00KiB(100%);      512B;         1536;                1; pred[512]\n"
        "\n"
        "  cumulative_size;       size;       offset; used_by_n_values; shapes_list\n"
        "  ------------------------------------------------------------\n"
        "    1.00KiB(100%);    1.00KiB;            0;                1; f32[256]\n"
        "Memory Space: vmem (color=1)\n"
        "Total bytes: 999999 (977KiB)\n"
    )
    (tmp_path / "module.g.after-memory-usage-report.txt").write_text("Total bytes: 9\n")
    assert reported_memory(tmp_path) == (3000, [(1536, "2×f32[384]"), (512, "pred[512]")])  # noqa: RUF001


def test_a_refusal_says_how_much_is_needed():
    message = "the total memory required for HLO temporaries (24.50G) exceeds available HBM (15.75G)."
    assert _refused(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {message}") == 24.5 * GIB
    used = "Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G."
    assert _refused(f"RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. {used}") == 24.5 * GIB
    assert _refused("INTERNAL: something else (24.50G)") is None
