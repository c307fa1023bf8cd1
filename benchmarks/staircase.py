"""Latency of K_c latent reasoning states: the staircase beside its baselines and plain forwards, on
the same random weights and the same cached prompt, in one run.

wallwm bench staircase -- --size 0.8b
wallwm bench staircase -- --size 0.8b --table --plot docs/images/staircase_cost.png

Every call is jitted, warmed up and waited for; calls alternate. What they are:

  staircase, serial, parallel   the three modes of `language.latent_states`
  upper_block   the upper layers (N_r and above) on K_c tokens that continue the prompt
  upper_token   the upper layers on one token
  full_token    all layers on one token, as in ordinary decoding
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp

from wallwm_jax.config import LanguageConfig, QwenConfig, StaircaseConfig, VisionTowerConfig
from wallwm_jax.models import language
from wallwm_jax.models.binding import bind
from wallwm_jax.models.vlm.layers import Layers, slice_cache
from wallwm_jax.models.vlm.rotary import rotation, text_positions
from wallwm_jax.types import Params

Call = Callable[[], Any]

# No call reads the embedding table, so a small one stands in for the real one.
_COMMON = dict(vocab=1024, vision=VisionTowerConfig(layers=0), dtype='float32')
SIZES = {
  'tiny': QwenConfig(
    **_COMMON,
    width=64,
    ffn=192,
    layer_types=('linear', 'linear', 'linear', 'full') * 3,
    heads=2,
    kv_heads=1,
    head_dim=32,
    linear_key_heads=2,
    linear_value_heads=2,
    linear_key_dim=32,
    linear_value_dim=32,
    mrope_section=(2, 1, 1),
  ),
  'small': QwenConfig(
    **_COMMON,
    width=256,
    ffn=896,
    heads=4,
    kv_heads=2,
    head_dim=64,
    linear_key_heads=4,
    linear_value_heads=4,
    linear_key_dim=64,
    linear_value_dim=64,
    mrope_section=(3, 3, 2),
  ),
  '0.8b': QwenConfig(**_COMMON),
}
MODES = 'staircase', 'serial', 'parallel'
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}
COUNTS = (1, 2, 4, 8, 16, 32)  # K_c of the table


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=SIZES, default='small')
  parser.add_argument('--latents', type=int, default=16, help='K_c')
  parser.add_argument('--relay', type=int, help='N_r; default: a third of the layers')
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--prompt', type=int, default=256, help='tokens of the cached prompt')
  parser.add_argument('--rounds', type=int, default=11)
  parser.add_argument('--clock', choices=CLOCKS, default='wall', help='cpu: processor time')
  parser.add_argument('--table', action='store_true', help='several N_r and K_c instead of one')
  parser.add_argument('--plot', help='draw the table to this file')
  parser.add_argument('--out', help='also write the JSON line to this file')
  args = parser.parse_args()
  if args.plot and not args.table:
    parser.error('--plot draws the table: add --table.')
  model = Model(SIZES[args.size], args.batch, args.prompt)
  run = {'rounds': args.rounds, 'clock': CLOCKS[args.clock]}
  if args.table:
    figures = table(model, run)
  else:
    relay = model.vlm.layers // 3 if args.relay is None else args.relay
    figures = one(model, relay, args.latents, run)
  if args.plot:
    draw(figures, model.vlm.layers, args.clock, args.plot)
  harness.report(
    f'staircase decoding, size {args.size}: {model.vlm.layers} layers of width {model.vlm.width}',
    'ms',
    args.rounds,
    path=args.out,
    clock=args.clock,
    dtype=model.vlm.dtype,
    batch=args.batch,
    prompt=args.prompt,
    threads=len(os.sched_getaffinity(0)),
    **figures,
  )


class Model:
  """A VLM with random weights and a random prompt in its cache."""

  def __init__(self, vlm: QwenConfig, batch: int, prompt: int):
    self.vlm, self.batch = vlm, batch
    self.params = language.init_qwen(vlm, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, prompt, vlm.width))
    positions = text_positions(jnp.zeros(batch, jnp.int32), prompt)
    mask = jnp.ones((batch, prompt), bool)
    read = jax.jit(lambda p: language.prefill(p, vlm, x, positions, mask, size=prompt)[1])
    self.cache = jax.block_until_ready(read(self.params))

  def branch(self, relay: int, latents: int) -> Params:
    key = jax.random.key(2)
    return language.init_staircase(self._config('staircase', relay, latents), self.params, key)

  def mode(self, name: str, branch: Params, relay: int, latents: int) -> Call:
    config = self._config(name, relay, latents)
    run = jax.jit(lambda branch, vlm, cache: language.latent_states(branch, vlm, config, cache))
    own = branch | {'steps': branch['steps'][:latents]}
    return lambda: run(own, self.params, self.cache)

  def forward(self, layers: Params, first: int, tokens: int) -> Call:
    """The layers from `first` on, of which `layers` are the parameters, on tokens that continue the
    prompt."""
    vlm, types = self.vlm, self.vlm.layer_types
    cache = slice_cache(self.cache, types, first, len(types))
    x = jax.random.normal(jax.random.key(3), (self.batch, tokens, vlm.width))

    @jax.jit
    def run(layers, x, cache):
      turn = rotation(vlm, text_positions(cache.position, tokens))
      return bind(Layers, vlm, layers, types[first:]).extend(x, turn, cache)[0]

    return lambda: run(layers, x, cache)

  def _config(self, mode: str, relay: int, latents: int) -> LanguageConfig:
    stairs = StaircaseConfig(latents=latents, relay_depth=relay, mode=mode)
    return LanguageConfig(kind='qwen', vlm=self.vlm, reader=self.vlm, staircase=stairs)


def one(model: Model, relay: int, latents: int, run: dict) -> dict:
  """Everything at one N_r and K_c."""
  branch = model.branch(relay, latents)
  calls = {name: model.mode(name, branch, relay, latents) for name in MODES}
  calls |= {
    'upper_block': model.forward(branch['layers'], relay, latents),
    'upper_token': model.forward(branch['layers'], relay, 1),
    'full_token': model.forward(model.params['text']['layers'], 0, 1),
  }
  times = harness.time_side_by_side(calls, **run)
  pairs = [('serial', 'staircase'), ('parallel', 'staircase')]
  pairs += [('staircase', name) for name in ('upper_block', 'upper_token', 'full_token')]
  return {
    'relay_depth': relay,
    'latents': latents,
    'median_ms': {name: _ms(seconds) for name, seconds in times.items()},
    'spread_ms': {name: [1e3 * min(t), 1e3 * max(t)] for name, t in times.items()},
    'ratios': {f'{a} / {b}': harness.ratio(times, a, b) for a, b in pairs},
    'goals': {'serial / staircase': f'>= {latents / 2:g}', 'staircase / upper_block': '<= 1.3'},
  }


def table(model: Model, run: dict) -> dict:
  """Median ms by K_c: the staircase and the upper layers alone per N_r, the serial baseline (which
  has no use for N_r) beside the second."""
  depths = [model.vlm.layers * part // 6 for part in (0, 1, 2, 3, 4)]
  rows, serial = {}, {}
  for relay in depths:
    branch = model.branch(relay, max(COUNTS))
    calls = {}
    for latents in COUNTS:
      calls['staircase', latents] = model.mode('staircase', branch, relay, latents)
      calls['upper_block', latents] = model.forward(branch['layers'], relay, latents)
      if relay == depths[1]:
        calls['serial', latents] = model.mode('serial', branch, relay, latents)
    times = harness.time_side_by_side(calls, **run)
    ms = {name: _ms(seconds) for name, seconds in times.items()}
    serial |= {count: value for (name, count), value in ms.items() if name == 'serial'}
    rows[relay] = {
      name: {count: ms[name, count] for count in COUNTS} for name in ('staircase', 'upper_block')
    }
    print(relay, rows[relay], file=sys.stderr)
  return {'table': rows, 'serial_ms': serial}


def _ms(seconds: list[float]) -> float:
  return 1e3 * statistics.median(seconds)


def draw(figures: dict, layers: int, clock: str, path: str) -> None:
  """Latency against K_c, and how many times faster than serial, a line per N_r."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  from matplotlib import ticker

  fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  serial = figures['serial_ms']
  left.plot(serial.keys(), serial.values(), 'k--', marker='.', label='serial')
  for i, (relay, row) in enumerate(figures['table'].items()):
    color = plt.colormaps['viridis'](i / len(figures['table']))
    ms = row['staircase']
    left.plot(ms.keys(), ms.values(), color=color, marker='.', label=f'staircase, N_r = {relay}')
    right.plot(ms.keys(), [serial[k] / ms[k] for k in ms], color=color, marker='.')
  right.plot(COUNTS, [k / 2 for k in COUNTS], 'k:', label='K_c / 2')
  left.set_ylabel({'wall': 'ms', 'cpu': 'ms of processor time'}[clock])
  right.set_ylabel('times faster than serial')
  for axes in (left, right):
    axes.set(xscale='log', yscale='log', xlabel=f'K_c latents ({layers} layers)')
    axes.set_xticks(COUNTS, COUNTS)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.spines[['top', 'right']].set_visible(False)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  fig.savefig(path, dpi=150)


if __name__ == '__main__':
  main()
