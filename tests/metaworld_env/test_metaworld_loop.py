"""Closed loop in Meta-World itself: turns, parallel processes, and what a policy gets to see. Needs
the extra `metaworld`."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from wallwm_jax import config as configs
from wallwm_jax.commands import metaworld_attempts
from wallwm_jax.envs.metaworld import VIEWS, MetaWorldEnv, library, target_of, tasks, workers
from wallwm_jax.envs.metaworld.phases import Expert
from wallwm_jax.geometry.poses import relative_pose
from wallwm_jax.inference.sources import NOTHING, CaptionTable
from wallwm_jax.models import functional
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.types import Frozen, InferenceParams, NormStats

if importlib.util.find_spec('metaworld') is None:
  pytest.skip(f'needs Meta-World: {library.INSTALL}', allow_module_level=True)
library.load()
SIZE = (16, 16)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),  # the experts warn of clipped commands
]


def demonstrated(task: str, seed: int) -> np.ndarray:
  """Absolute targets [T, 10] of the expert, up to its success."""
  env, targets = MetaWorldEnv(task, SIZE), []
  env.reset(seed)
  expert = Expert(task, env.expert_policy())
  while not env.succeeded:
    command, _ = expert.act(env.expert_observation)
    targets.append(target_of(env.pose(), command))
    env.command(command)
  return np.stack(targets)


@pytest.mark.parametrize('task', ['drawer-close', 'pick-place'])
def test_an_experts_targets_solve_the_task_turn_by_turn(task):
  targets = demonstrated(task, 3)
  lane = workers.Lane(workers.Turns(SIZE))
  seen = lane.start(workers.Start(task, 3))
  assert seen.event == seen.reached == tasks.script_rows(task)[0] and seen.progress == 0
  events, progress = [], []
  for start in range(0, len(targets), 7):
    assert not seen.over and seen.steps == start
    seen = lane.move(workers.Move(relative_pose(seen.state[None], targets[start : start + 7])))
    events.append(seen.event)
    progress.append(seen.progress)
  assert seen.success and seen.over and seen.steps == len(targets) and seen.progress == 100
  rows = tasks.script_rows(task)
  places = [rows.index(event) for event in events]
  assert places == sorted(places) and seen.reached == rows[-1] == events[-1]
  assert progress == sorted(progress) and progress[-2] == 100 * (len(rows) - 1) / len(rows)
  lane.close()


@pytest.mark.parametrize('past, stride, delay', [(0, 1, 0), (4, 1, 0), (4, 2, 3), (12, 1, 0)])
def test_a_policy_sees_the_frames_it_looks_back_on(past, stride, delay):
  """Against an environment that is drawn at every step."""
  rng = np.random.default_rng(0)
  lane = workers.Lane(workers.Turns(SIZE, VIEWS[::2], stride, past, delay, max_steps=40))
  seen = lane.start(workers.Start('push', 1))
  env = MetaWorldEnv('push', SIZE)
  env.reset(1)

  def draw():
    frames = env.observe().frames
    return np.stack([frames[view] for view in VIEWS[::2]])

  drawn, hold = [draw()], np.full(10, np.nan, np.float32)
  while not seen.over:
    times = np.maximum(len(drawn) - 1 - stride * np.arange(past, -1, -1), 0)
    np.testing.assert_array_equal(seen.frames, np.stack([drawn[t] for t in times], axis=1))
    np.testing.assert_array_equal(seen.state, env.pose())
    actions = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (8, 1))
    actions[:, :3] = np.cumsum(rng.normal(0, 0.004, (8, 3)), axis=0)
    targets = np.repeat(env.pose()[None] + actions - actions[0] * [0, 0, 0, *[1] * 6, 0], stride, 0)
    targets[:, 9] = 1
    for target in [*[hold] * delay, *targets.astype(np.float32)][: 40 - len(drawn) + 1]:
      env.step(target)
      drawn.append(draw())
      hold = target
    seen = lane.move(workers.Move(actions))
  assert seen.steps == len(drawn) - 1 == 40 and seen.frames is None
  np.testing.assert_allclose(seen.state, env.pose(), atol=1e-6)


def test_films_have_a_frame_of_every_action():
  lane = workers.Lane(workers.Turns(SIZE, stride=2, delay=2, record=True, max_steps=27))
  seen = lane.start(workers.Start('push', 1))
  still = np.tile(np.float32([0, 0, 0, 1, 0, 0, 0, 1, 0, 1]), (4, 1))
  lengths = []
  while not seen.over:
    seen = lane.move(workers.Move(still))
    lengths.append(seen.film.shape)
  assert lengths == [(3, 5, *SIZE, 3)] * 2 + [(3, 4, *SIZE, 3)]  # the last one ends at step 27


@pytest.fixture(scope='module')
def policy():
  """(config, params, captions) of a tiny model whose every weight matters."""
  model = configs.ModelConfig(
    video=configs.VideoConfig(width=16, layers=2, heads=2, ffn=32, patch=(1, 1, 1), freq_dim=16),
    action=configs.ActionConfig(width=16, heads=2, ffn=32, freq_dim=16),
    codec=configs.CodecConfig(channels=12), text=configs.TextConfig(tokens=4, width=8),
    views=VIEWS, image_size=SIZE, history=1, future=2, max_future=4,
  )  # fmt: skip
  config = configs.ExperimentConfig(
    model=model, data=configs.DataConfig(buckets=(3,)),
    inference=configs.InferenceConfig(video_steps=1, action_steps=2),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: functional.init_params(model, jax.random.key(0)))
  weights = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
  scales = [np.full(10, x, np.float32) for x in (0, 0.01, 0, 1)]
  norm = NormStats(*scales, np.zeros(12, np.float32), np.ones(12, np.float32))
  text = make_text_encoder(model.text).encode(tasks.CAPTIONS)
  table = CaptionTable(text, np.full(len(tasks.CAPTIONS), 2, np.int32))
  return config, InferenceParams(weights, Frozen(norm)), table


def test_neither_processes_nor_neighbours_change_an_attempt(policy):
  config, params, table = policy
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, window='chunk'))

  def rows(names, processes):
    done = metaworld_attempts.attempt(
      config, params, names, table, per_task=2, max_steps=32, processes=processes
    )
    columns = ('kind', 'seed', 'success', 'steps', 'progress', 'seam_jump', 'reached')
    return [[row[name] for name in columns] for row in done.rows()]

  first = rows(('reach', 'push'), 1)
  assert len({row[5] for row in first}) == 4  # every attempt moves in its own way
  assert rows(('push', 'reach'), 2) == first[2:] + first[:2]


class InThisProcess:
  """Workers without processes, so that their environments can be tampered with."""

  def __init__(self, turns, lanes, processes):
    self.lanes = [workers.Lane(turns) for _ in range(lanes)]
    self.asked = {}

  def send(self, requests):
    self.asked |= requests

  def receive(self, lanes):
    return {lane: self._answer(lane) for lane in lanes if lane in self.asked}

  def _answer(self, lane):
    request = self.asked.pop(lane)
    worker = self.lanes[lane]
    return worker.start(request) if isinstance(request, workers.Start) else worker.move(request)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for lane in self.lanes:
      lane.close()


def watched(policy, source: str, monkeypatch, tampered: bool):
  """(leaves that entered the policy's program in each call, what the script said) of an evaluation
  whose observations say that all objects and the goal are in the hand if `tampered`."""
  program, entered, said = metaworld_attempts._program, [], []

  def watch(*args):
    run = program(*args)

    def call(params, captions, planning, *inputs):
      sight, mind, key, fresh = inputs
      leaves = jax.tree.leaves((sight, mind, jax.random.key_data(key), fresh))
      entered.append([np.asarray(leaf) for leaf in leaves])
      return run(params, captions, planning, *inputs)

    return call

  command, reset, seen = MetaWorldEnv.command, MetaWorldEnv.reset, workers.Lane._seen

  def tamper(env):
    if tampered:
      env._observation[4:] = np.resize(env._observation[:3], len(env._observation) - 4)

  def tampered_reset(env, seed):
    reset(env, seed)
    tamper(env)

  def tampered_command(env, given):
    solved = command(env, given)
    tamper(env)
    return solved

  def listen(lane, film):
    found = seen(lane, film)
    said.append((found.event, found.reached, found.progress))
    return found

  with monkeypatch.context() as patch:
    patch.setattr(metaworld_attempts, '_program', watch)
    patch.setattr(workers, 'Workers', InThisProcess)
    patch.setattr(workers.Lane, '_seen', listen)
    patch.setattr(MetaWorldEnv, 'reset', tampered_reset)
    patch.setattr(MetaWorldEnv, 'command', tampered_command)
    metaworld_attempts.attempt(
      *policy[:2], ('pick-place', 'drawer-open'), policy[2], per_task=1, max_steps=40, source=source
    )
  return entered, said


def test_no_privileged_state_enters_the_policys_program(policy, monkeypatch):
  """Objects and goals in the observation may be anything: the program gets the same bits. Not so
  the facts for scores, and for sources that follow the script, which shows that tampering does
  something."""
  (plain, true), (noisy, other) = (
    watched(policy, 'instruction', monkeypatch, tampered) for tampered in (False, True)
  )
  assert true != other
  assert len(plain) == len(noisy) >= 5
  for a, b in zip(plain, noisy):
    assert len(a) == len(b) == 10  # three of the observation, three rows, clock, step, key, fresh
    for x, y in zip(a, b):
      np.testing.assert_array_equal(x, y)
  rows = {int(x) for call in plain for x in call[5].ravel()}
  assert rows == {NOTHING}  # nor does it know where the script stands
  (plain, _), (noisy, _) = (
    watched(policy, 'atomic', monkeypatch, tampered) for tampered in (False, True)
  )
  assert any((a[5] != b[5]).any() for a, b in zip(plain, noisy))
