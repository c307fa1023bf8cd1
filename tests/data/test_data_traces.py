import itertools
import re

import numpy as np
import pytest

from wallwm_jax.data import phrases, traces
from wallwm_jax.data.traces import METAWORLD, Facts, goal_words, phrasings, style_of, trace
from wallwm_jax.envs.tabletop.tasks import CAPTIONS

INSTRUCTIONS = [*CAPTIONS, *dict.fromkeys(task.instruction for task in METAWORLD.values())]
FOREIGN = ['Wipe the table with the towel.', 'do the dishes', 'Robot: fold it, then stack it']


def words(text):
  return set(re.findall(r'[a-z]+', text))


@pytest.mark.parametrize('text', [*INSTRUCTIONS[::7], *FOREIGN])
def test_every_instruction_has_wordings_of_both_kinds(text):
  train, heldout = phrasings(text)
  assert train[0] == traces.plain(text)
  assert len(train) >= 6 and len(heldout) >= 3
  assert len({*train, *heldout}) == len(train) + len(heldout)


def test_no_wording_belongs_to_two_instructions():
  owner = {}
  for text in INSTRUCTIONS:
    for wording in itertools.chain(*phrasings(text)):
      assert owner.setdefault(wording, text) == text


def test_heldout_wordings_need_no_new_word():
  both = zip(*map(phrasings, CAPTIONS))
  train, heldout = (words(' '.join(itertools.chain(*wordings))) for wordings in both)
  assert heldout <= train
  styles = {word for style in phrases.STYLES for word in words(style)}
  assert {word for style in phrases.HELDOUT_STYLES for word in words(style)} <= styles


def test_wordings_of_a_composition_name_both_halves_in_order():
  text = 'put the red cube on the blue zone, then the green cube on the purple zone'
  for wording in itertools.chain(*phrasings(text)):
    places = [wording.index(name) for name in ('red', 'blue', 'green', 'purple')]
    assert places == sorted(places)


def test_choices_reach_every_wording_and_canonical_ignores_them():
  text = 'grasp the red cube'
  for kind in ('train', 'heldout'):
    got = {traces.instruct(text, kind, choice) for choice in range(100)}
    assert got == set(getattr(phrasings(text), kind))
  assert traces.instruct('Grasp  the red cube.', 'canonical', 5) == text


def test_styles_follow_from_the_wording_and_heldout_ones_are_apart():
  known = len(phrases.STYLES)
  train = {style_of(w) for text in INSTRUCTIONS for w in phrasings(text).train}
  heldout = {style_of(w) for text in INSTRUCTIONS for w in phrasings(text).heldout}
  assert train == set(range(known))
  assert heldout == set(range(known, known + len(phrases.HELDOUT_STYLES)))
  asked = [style_of(phrase.format('lift the red cube')) for phrase in phrases.FRAMES]
  assert asked == [style_of(phrase.format('open the door')) for phrase in phrases.FRAMES]


def test_a_trace_word_for_word():
  facts = Facts(
    task='Put the red cube on the blue zone.',
    done='lift the red cube',
    next='move the red cube over the blue zone',
    where='far left',
  )
  assert trace(facts, 0) == (
    'think: put the red cube on the blue zone. done: lifted the red cube. next: move the red cube '
    'over the blue zone. why: it is not there. goal: far left.'
  )
  assert trace(facts, 1).startswith('think: i must put the red cube on the blue zone. so far: ')


@pytest.mark.parametrize(
  'done,said',
  [
    ('', 'nothing'),
    ('place the red cube on the blue zone', 'placed the red cube'),
    ('push the red cube left', 'pushed the red cube left'),
    ('pick up the red cube', 'picked up the red cube'),
    ('the robot waits', 'the robot waits'),
  ],
)
def test_progress_is_told_in_the_past_tense(done, said):
  assert f'done: {said}. next' in trace(Facts('wait', done, 'wait', ''), 0)


def test_every_style_tells_every_part():
  facts = Facts('lift the red cube', 'grasp the blue cube', 'open the drawer', 'near up')
  for style in range(len(phrases.STYLES + phrases.HELDOUT_STYLES)):
    text = trace(facts, style)
    for part in ('lift the red cube', 'grasped the blue cube', 'open the drawer', 'near up',
                 'it is not open'):
      assert text.count(part) == 1
    assert text.startswith('think: ')


def _pose(x=0.0, y=0.0, z=0.0):
  return np.array([x, y, z, 1, 0, 0, 0, 1, 0, 1], np.float32)


@pytest.mark.parametrize(
  'goal,source,said',
  [
    (_pose(0.01, -0.01), 'tabletop', 'close'),
    (_pose(0.05, 0.02), 'tabletop', 'near right'),
    (_pose(-0.05, 0.02), 'metaworld', 'near left'),
    (_pose(0.0, 0.2, 0.1), 'tabletop', 'far forward'),
    (_pose(0.0, -0.1, 0.11), 'tabletop', 'far up'),
    (_pose(0.0, 0.0, -0.05), 'tabletop', 'near down'),
    (_pose(0.05), 'droid', 'near forward'),
    (_pose(0.0, 0.05), 'droid', 'near left'),
  ],
)
def test_where_the_goal_is(goal, source, said):
  assert goal_words(_pose(), goal, source) == said


def test_of_two_arms_the_one_with_further_to_go_counts():
  start = np.concatenate([_pose(), _pose()])
  goal = np.concatenate([_pose(0.05), _pose(0, 0, 0.2)])
  assert goal_words(start, goal, 'tabletop') == 'far up'


def test_only_positions_tell_where_the_goal_is():
  turned = _pose(0.05)
  turned[3:] = [0, 1, 0, -1, 0, 0, 0]
  assert goal_words(_pose(), turned, 'tabletop') == goal_words(_pose(), _pose(0.05), 'tabletop')


@pytest.mark.parametrize('seconds,said', [(0.1, '01'), (0.96, '10'), (9.9, '99'), (60.0, '99')])
def test_plans_with_times(seconds, said):
  assert traces.timed_plan('lift it', seconds) == f'plan: lift it; {said} tenths'


def test_metaworld_table_is_complete_and_its_phases_are_captions():
  assert len(METAWORLD) == 50
  for task in METAWORLD.values():
    for caption in task.phases:
      assert caption.split()[0] in phrases.PAST and 'the ' in caption
    asked = task.instruction + ' ' + ' '.join(task.phases)
    assert all(thing in asked for thing in task.objects)
