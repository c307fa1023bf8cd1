"""Costs read from HLO text: hand-written schedules with known answers, and one real TPU program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wallwm_jax.parallel import aot, hlo
from wallwm_jax.types import ConfigError, WallWMError

# One cycle is a second, one byte on the wire is a second.
CHIP = hlo.Chip(1.0, 1.0, lambda kind, size: 1.0)


def op(name: str, rest: str, cycles: int | None = None) -> str:
  config = (
    f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}' if cycles else ''
  )
  return f'  %{name} = {rest}{config}'


def program(*entry: str, others: str = '') -> str:
  body = '\n'.join(entry)
  head = f'HloModule m, is_scheduled=true\n\n{others}\n'
  return f'{head}ENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n'


def test_cycles_of_fusions_copies_and_matmuls_add_up():
  text = program(
    op('p', 'f32[4]{0:T(128)} parameter(0)'),
    op('a', 'f32[4]{0:T(128)} fusion(%p), kind=kLoop, calls=%fused', 10),
    op('b', '(bf16[2,4]{1,0}, /*index=1*/f32[4]{0}) fusion(%a), kind=kOutput, calls=%fused', 7),
    op('c', 'f32[4]{0} copy(%p)', 5),
  )
  cost = hlo.cost(text, CHIP)
  assert (cost.compute_s, cost.exposed_s, cost.collectives) == (22.0, 0.0, ())


def test_result_sizes_and_operands_are_read():
  text = program(op('b', '(bf16[2,4]{1,0}, /*index=1*/f32[4]{0}) fusion(%a, %p), calls=%fused'))
  (instruction,) = hlo.parse(text)[0]['main']
  assert instruction.result == (16, 16)
  assert instruction.operands == ('a', 'p')
  assert instruction.called == ('fused',)


def test_simulated_cycles_are_kept_apart_and_0_means_none():
  text = op('a', 'f32[4]{0} fusion(%p), kind=kLoop, calls=%f', 10)
  simulated = text.replace('{"window', '{"bundle_analysis_data":{"estimated_cycles":"7"},"window')
  for line, expected in (
    (text, (10, None)),
    (simulated, (10, 7)),
    (simulated.replace('"7"', '"0"'), (10, None)),
  ):
    (instruction,) = hlo.parse(program(line))[0]['main']
    assert (instruction.cycles, instruction.simulated) == expected


SLICED = """%fused (x: f32[4,8], i: s32[]) -> f32[1,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,8}
}

%updated (x: f32[4,8], u: f32[1,8], i: s32[]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[4,8]{1,0} dynamic-update-slice(%x, %u, %i, %i)
}

%outer (x: f32[4,8], i: s32[]) -> f32[1,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %inner = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
STACK = op('x', 'f32[4,8]{1,0:T(8,128)} parameter(0)')
INDEX = op('i', 's32[]{:T(128)S(6)} parameter(1)')


@pytest.mark.parametrize(
  'instruction, moved',
  [
    ('f32[4,8]{1,0:T(8,128)} copy(%x)', 256),
    ('f32[4,8]{1,0:T(8,128)S(1)} copy(%x)', 128),  # into the core
    ('f32[4,8]{1,0} bitcast(%x)', 0),
    ('f32[1,8]{1,0} dynamic-slice(%x, %i, %i)', 64),
    ('f32[1,8]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%fused', 32),
    ('f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%outer', 64),
    ('f32[4,8]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%updated', 64),
    ('(f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x)', 128),
    ('((f32[4,8]{1,0}), f32[1,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}', 32),
    ('f32[1,8]{1,0:S(1)} slice-done(%x)', 0),
  ],
)
def test_bytes_of_memory_count_slices_and_not_the_core(instruction, moved):
  lines = [STACK, INDEX, op('u', 'f32[1,8]{1,0} parameter(2)'), op('it', instruction)]
  computations, entry = hlo.parse(program(*lines, others=SLICED))
  made = {x.name: x for x in computations[entry]}
  assert hlo.Traffic(computations).of(made['it'], made) == moved


GROUPS = 'replica_groups={{0,1,2,3},{4,5,6,7}}'


@pytest.mark.parametrize(
  'kind,result,expected',
  [
    ('all-to-all', 64, 48.0),
    ('all-gather', 64, 48.0),
    ('all-reduce', 64, 96.0),
    ('reduce-scatter', 16, 48.0),
  ],
)
def test_wire_bytes_of_a_ring_of_four(kind, result, expected):
  text = program(op('x', f'f32[{result // 4}]{{0}} {kind}(%p), {GROUPS}, dimensions={{0}}'))
  cost = hlo.cost(text, CHIP)
  assert cost.wire_bytes() == {kind: expected}
  assert (cost.compute_s, cost.exposed_s) == (0.0, expected)  # synchronous: nothing hides it
  assert not cost.collectives[0].asynchronous


@pytest.mark.parametrize(
  'groups', ['[2,4]<=[8]', "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", '{{0,1,2,3},{4,5,6,7}}']
)
def test_every_way_to_write_groups(groups):
  text = program(op('x', f'f32[16]{{0}} all-gather(%p), replica_groups={groups}, dimensions={{0}}'))
  assert hlo.cost(text, CHIP).collectives[0].group_size == 4


def overlapped(compute: int) -> hlo.Cost:
  """An exchange of 48 bytes started before `compute` cycles of work."""
  start = f'((f32[16]{{0}}), f32[16]{{0}}, u32[]{{:S(2)}}) all-to-all-start(%p), {GROUPS}'
  return hlo.cost(
    program(
      op('s', start),
      op('f', 'f32[4]{0} fusion(%p), calls=%fused', compute),
      op('d', 'f32[16]{0} all-to-all-done(%s)'),
    ),
    CHIP,
  )


def test_an_asynchronous_exchange_hides_behind_compute():
  assert overlapped(100).exposed_s == 0.0
  assert overlapped(30).exposed_s == 18.0
  assert overlapped(30).seconds == 48.0
  assert overlapped(30).collectives[0].asynchronous


def test_asynchronous_collectives_of_several_arrays():
  """Results are told from operands and contexts, whatever the kind."""
  both = '(f32[16]{0}, f32[8]{0})'
  cases = {
    'all-reduce': (both, 2 * 96 * 3 / 4),
    'all-gather': ('((f32[4]{0}, f32[2]{0}), ' + both + ', u32[]{:S(2)})', 96 * 3 / 4),
    'all-to-all': (f'({both}, {both}, u32[], u32[])', 96 * 3 / 4),
  }
  for kind, (shape, expected) in cases.items():
    cost = hlo.cost(program(op('s', f'{shape} {kind}-start(%p, %q), {GROUPS}')), CHIP)
    assert cost.wire_bytes() == {kind: expected}, kind


def test_two_exchanges_share_the_links():
  start = f'((f32[16]{{0}}), f32[16]{{0}}) all-to-all-start(%p), {GROUPS}'
  text = program(
    op('s', start),
    op('t', start),
    op('d', 'f32[16]{0} all-to-all-done(%s)'),
    op('e', 'f32[16]{0} all-to-all-done(%t)'),
  )
  assert hlo.cost(text, CHIP).exposed_s == 96.0


def test_an_exchange_wrapped_in_a_computation_is_found():
  others = (
    f'%wrapped (q: f32[16]) -> f32[16] {{\n  ROOT %i = f32[16]{{0}} all-gather(%q), {GROUPS}\n}}\n'
  )
  text = program(
    op('s', '((f32[4]{0}), f32[16]{0}, s32[]) async-start(%p), calls=%wrapped, ' + GROUPS),
    op('d', 'f32[16]{0} async-done(%s)'),
    others=others,
  )
  assert hlo.cost(text, CHIP).wire_bytes() == {'all-gather': 48.0}


def loop(condition: str) -> str:
  others = (
    '%body (q: f32[4]) -> f32[4] {\n'
    + op('f', 'f32[4]{0} fusion(%q), calls=%fused', 11)
    + f'\n  ROOT %g = f32[16]{{0}} all-gather(%q), {GROUPS}\n}}\n\n'
    + f'%cond (q: f32[4]) -> pred[] {{\n{condition}\n}}\n'
  )
  return program(op('w', 'f32[4]{0} while(%p), condition=%cond, body=%body'), others=others)


def test_loop_bodies_count_as_often_as_they_run():
  cost = hlo.cost(loop('  %n = s32[]{:T(128)} constant(30)'), CHIP)
  assert (cost.compute_s, cost.wire_bytes()['all-gather']) == (330.0, 30 * 48.0)
  assert cost.collectives[0].count == 30


def test_what_cannot_be_costed_is_refused():
  with pytest.raises(WallWMError, match='w: expected one constant in its condition'):
    hlo.cost(loop('  %n = s32[]{:T(128)} parameter(0)'), CHIP)
  kernel = op('k', 'bf16[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"')
  with pytest.raises(WallWMError, match='k: the compiler estimates no cycles'):
    hlo.cost(program(kernel), CHIP)
  assert hlo.cost(program(kernel), CHIP, lambda op: op.result[0]).compute_s == 8.0
  with pytest.raises(WallWMError, match='ENTRY'):
    hlo.parse('nothing')


def test_constants_of_a_chip_follow_its_torus():
  small, large = (aot.chip(f'v5p:{s}').wire_bytes_per_s for s in ('4x4x4', '8x8x8'))
  assert small('all-to-all', 64) == 180e9 and large('all-to-all', 512) == 90e9
  assert small('all-gather', 64) == large('all-gather', 512) == 540e9
  assert large('all-reduce', 8) == 180e9 and large('all-gather', 64) == 360e9
  assert aot.chip('v6e:4x4').hbm_bytes_per_s == 1640e9
  with pytest.raises(ConfigError, match="v4:2x2x2.*'v5p', 'v6e'"):
    aot.chip('v4:2x2x2')


def test_unknown_topologies_are_refused():
  with pytest.raises(ConfigError, match="'v5p:0x9': expected one like v5p:4x4x4"):
    aot.tpu_devices('v5p:0x9')


def test_a_real_program_is_costed():
  """A matmul of 2 n^3 FLOPs cannot beat the peak, and comes close to it; its gather is counted."""
  n, devices = 4096, aot.tpu_devices('v5p:2x2x1')
  mesh = Mesh(np.array(devices), ('fsdp',))

  def step(x, w):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
    return x @ w

  def spec(*axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=sharding)

  compiled = aot.compile_for_tpu(jax.jit(step).lower(spec('fsdp', None), spec('fsdp', None)))
  cost = hlo.cost(compiled.as_text(), aot.chip('v5p:2x2x1'))
  at_peak = 2 * n**3 / len(devices) / aot.PEAK_FLOPS['v5p']
  assert at_peak < cost.compute_s < 1.6 * at_peak
  assert cost.wire_bytes() == {'all-gather': 2 * n * n * 3 / 4}
