"""Attempts in Meta-World with a stand-in for its processes: seeds, rows, planners, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wallwm_jax.commands import attempts, metaworld_attempts
from wallwm_jax.envs.metaworld import tasks, workers
from wallwm_jax.envs.metaworld.collect import TRIES, episode_seed
from wallwm_jax.evaluation import compare
from wallwm_jax.inference import sources
from wallwm_jax.inference.language import PlanningTable
from wallwm_jax.types import ActionChunk, ConfigError, Prompt

VIEWS = ('corner', 'gripperPOV')


class Processes:
  """Every turn is carried out to its end; 'reach' is solved after 20 steps, nothing else."""

  made: list = []

  def __init__(self, turns, lanes, processes):
    self.turns, self.lanes = turns, {}
    self.made.append((turns, lanes, processes))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def send(self, requests):
    for lane, request in requests.items():
      if isinstance(request, workers.Start):
        self.lanes[lane] = [request, 0, []]
      else:
        state = self.lanes[lane]
        turn = len(request.actions) * self.turns.stride + self.turns.delay
        state[1] = min(state[1] + turn, self.turns.max_steps)
      self.lanes[lane][2] = True

  def receive(self, lanes):
    return {lane: self._seen(lane) for lane in lanes if lane in self.lanes and self._pending(lane)}

  def _pending(self, lane):
    pending, self.lanes[lane][2] = self.lanes[lane][2], False
    return pending

  def _seen(self, lane):
    (start, steps, _), turns = self.lanes[lane], self.turns
    success = start.task == 'reach' and steps >= 20
    rows = tasks.script_rows(start.task)
    shape = (len(turns.views), turns.past + 1, *turns.size, 3)
    film = (len(turns.views), 4, *turns.size, 3)
    return workers.Seen(
      frames=np.full(shape, steps % 256, np.uint8),
      state=np.float32([0, 0.6, 0.2, 1, 0, 0, 0, 1, 0, 1]),
      success=success,
      over=success or steps >= turns.max_steps,
      steps=steps,
      event=rows[0],
      reached=rows[-1],
      progress=100.0 * success,
      film=np.zeros(film, np.uint8) if turns.record and steps else None,
    )


@pytest.fixture
def world(monkeypatch):
  monkeypatch.setattr(workers, 'Workers', Processes)
  monkeypatch.setattr(Processes, 'made', [])
  metaworld_attempts._program.cache_clear()
  yield
  metaworld_attempts._program.cache_clear()


@pytest.fixture
def still(monkeypatch):
  """In the place of the model, a policy that stays where it is, in turns of two latents."""

  def act(obs, text, key, length):
    return ActionChunk(jnp.zeros((1, 8, 10)), jnp.arange(8)[None] < 4 * length[:, None])

  monkeypatch.setattr(metaworld_attempts, 'make_act', lambda params, config: (act, 2, 0))


@pytest.fixture
def there(config):
  """There with the cameras of Meta-World, windows of two latents: there(window, stride)."""

  def make(config=config, window='event', stride=1):
    data = dataclasses.replace(config.data, window=window, buckets=(2,), stride=stride)
    model = dataclasses.replace(config.model, views=VIEWS)
    return dataclasses.replace(config, data=data, model=model)

  return make


@pytest.fixture
def table(config, store):
  made = attempts.caption_table(config, store, tasks.CAPTIONS)
  return dataclasses.replace(made, lengths=np.full(len(tasks.CAPTIONS), 2, np.int32))


def test_seeds_belong_to_a_task_and_are_not_those_of_demonstrations():
  seeds = {
    metaworld_attempts.episode_seed(s, task, k)
    for s in range(2) for task in tasks.SUITES['MT50'] for k in range(10)
  }  # fmt: skip
  assert len(seeds) == 1000
  shown = {episode_seed(s, slot, n) for s in range(2) for slot in range(500)
           for n in range(TRIES)}  # fmt: skip
  assert not seeds & shown


@pytest.mark.slow
@pytest.mark.parametrize('window, stride, delay', [('event', 1, 0), ('chunk', 2, 4)])
def test_attempts_are_scored_by_task(world, there, params, table, window, stride, delay):
  done = metaworld_attempts.attempt(
    there(window=window, stride=stride), params, ('reach', 'push'), table, per_task=2,
    max_steps=50, delay=delay, record=True, processes=3,
  )  # fmt: skip
  turn = 8 * stride + delay
  ((turns, lanes, processes),) = Processes.made
  assert (turns.views, turns.size, turns.stride, turns.delay) == (VIEWS, (16, 16), stride, delay)
  assert turns.past == (4 if window == 'chunk' else 0) and (lanes, processes) == (4, 3)
  rows = done.rows()
  assert [row['kind'] for row in rows] == ['reach', 'reach', 'push', 'push']
  assert [row['success'] for row in rows] == [True, True, False, False]
  steps = -(-20 // turn) * turn
  assert [row['steps'] for row in rows] == [steps, steps, 50, 50]
  assert rows[0]['time_s'] == pytest.approx(steps / 80) and np.isnan(rows[2]['time_s'])
  assert rows[2]['turns'] == -(-50 // turn) and rows[2]['reached'] == 'push the puck to the goal'
  assert [row['seed'] for row in rows] == [
    metaworld_attempts.episode_seed(0, task, k) for task in ('reach', 'push') for k in (0, 1)
  ]
  assert done.score().by_kind['reach'][0].value == 1 and done.suite['world'] == 'metaworld'
  assert [[turn.shape[1] for turn in film] for film in done.films] == [
    [4] * row['turns'] for row in rows
  ]
  assert done.fps == pytest.approx(80 / stride)
  scores = {'suite': {'kind': 'closedloop'} | done.suite, 'rows': rows}
  assert {'success', 'steps', 'progress', 'turns'} <= set(compare.compare(scores, scores))


@pytest.mark.parametrize('source', ['instruction', 'atomic', 'timed'])
def test_turns_go_by_the_captions_of_the_task(world, still, there, params, table, source):
  done = metaworld_attempts.attempt(
    there(), params, ('pick-place',), table, per_task=1, max_steps=40, source=source
  )
  asked = {
    'instruction': ['bring the puck to the goal'],
    'atomic': ['reach the puck'],
    'timed': ['reach the puck', 'grasp the puck', 'move the puck to the goal'],
  }[source]
  assert done.asked(0) == (asked + asked[-1:] * 5)[:5]


@pytest.mark.parametrize('window', ['event', 'chunk'])
def test_a_planner_speaks_in_the_captions_of_meta_world(
  world, still, there, table, speaking, one_plan, window
):
  config, params = speaking
  names = tasks.CAPTIONS
  right, wrong = names.index('reach the puck'), names.index('open the door')
  prompts = Prompt(np.zeros((len(names), 4), np.int32), np.ones((len(names), 4), bool))
  done = metaworld_attempts.attempt(
    there(config, window), params, ('push', 'door-open'), table, per_task=1, max_steps=24,
    source='planner', planning=PlanningTable(prompts, np.array([wrong, right], np.int32)),
  )  # fmt: skip
  assert done.asked(0) == ['reach the puck'] * 3 == done.asked(1)
  assert [row['planned'] for row in done.rows()] == [1, 0]


def test_a_person_is_asked_about_one_attempt_after_the_other(world, still, there, params, table):
  turns = []

  def ask(instruction, step, clock):
    turns.append((tasks.CAPTIONS[int(instruction)], int(step)))
    return jax.tree.map(np.asarray, sources.lookup(table, int(instruction)))

  done = metaworld_attempts.attempt(
    there(), params, ('reach', 'push'), table, per_task=1, max_steps=24, source='human', ask=ask
  )
  names = ['reach the goal', 'push the puck to the goal']
  assert turns == [(name, turn) for name in names for turn in range(3)]
  assert done.rollouts.success.tolist() == [True, False]


def test_other_cameras_are_refused(config, params, table):
  with pytest.raises(ConfigError, match='some of the cameras of Meta-World'):
    metaworld_attempts.attempt(config, params, ('reach',), table, per_task=1)
