"""What the TPU compiler makes of matrices in eight bits, stacked over layers and scanned."""

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from wallwm_jax.models.quantised import Quantised, matmul, pack
from wallwm_jax.parallel import aot, hlo

LAYERS, WIDTH, HIDDEN, TOKENS = 3, 4096, 12288, 16


def compiled(topology: str, dtype: str, block: int | None, inputs_too: bool) -> str:
  """HLO of a scanned two-matrix FFN on 16 tokens; every size but the depth is real."""

  def stack(inputs: int, out: int):
    def make(w):
      smooth = jnp.ones(w.shape[:-1]) if inputs_too else None
      return Quantised(**pack(w, dtype, block, smooth))

    return jax.eval_shape(make, jax.ShapeDtypeStruct((LAYERS, inputs, out), jnp.float32))

  def run(x, up, down):
    def layer(x, kernels):
      up, down = kernels
      return x + matmul(jax.nn.gelu(matmul(x, up, x.dtype)), down, x.dtype), None

    return jax.lax.scan(layer, x, (up, down))[0]

  x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
  here = SingleDeviceSharding(aot.tpu_devices(topology)[0])
  args = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
    (x, stack(WIDTH, HIDDEN), stack(HIDDEN, WIDTH)),
  )
  lowered = jax.jit(run).lower(*args)
  return aot.compile_for_tpu(lowered, exec_time_optimization_effort=-1.0).as_text()


def large(text: str) -> dict[str, set[str]]:
  """{opcode: types} of instructions with a result of the size of a matrix or more, in fusions too;
  what only names memory is left out."""
  naming = ('parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while')
  found: dict[str, set[str]] = collections.defaultdict(set)
  for op in itertools.chain(*hlo.parse(text)[0].values()):
    for kind, sizes in re.findall(r'^(\w+)\[([\d,]+)\]', op.text):
      if math.prod(map(int, sizes.split(','))) >= WIDTH * HIDDEN and op.opcode not in naming:
        found[op.opcode].add(kind)
  return found


def products(text: str) -> list[str]:
  operations = itertools.chain(*hlo.parse(text)[0].values())
  return [op.text.split('[')[0] for op in operations if op.opcode in ('convolution', 'dot')]


@pytest.mark.parametrize(
  'topology, dtype', (('v5p:2x2x1', 'int8'), ('v6e:2x2', 'float8_e4m3fn'))
)
def test_the_stack_is_read_in_eight_bits(topology, dtype):
  """No matrix is written in bfloat16 or float32, not even inside of a fusion."""
  text = compiled(topology, dtype, None, inputs_too=False)
  eight = 's8' if dtype == 'int8' else 'f8e4m3fn'
  assert large(text)['dynamic-slice'] == {eight}  # a layer of the stack, inside of its product
  assert set().union(*large(text).values()) == {eight}
  assert products(text) == ['f32', 'f32']


def test_blocks_are_read_in_eight_bits():
  text = compiled('v5p:2x2x1', 'int8', 1024, inputs_too=False)
  assert set().union(*large(text).values()) == {'s8'}


@pytest.mark.parametrize('topology', ('v5p:2x2x1', 'v6e:2x2'))
def test_products_of_quantised_inputs_are_of_integers(topology):
  text = compiled(topology, 'int8', None, inputs_too=True)
  assert products(text) == ['s32', 's32']
  assert set().union(*large(text).values()) == {'s8'}
