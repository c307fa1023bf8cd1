import collections
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from episode_factory import encode_text, make_episode, make_store

from wallwm_jax.config import (
  DataConfig,
  ExperimentConfig,
  LanguageConfig,
  ModelConfig,
  QwenConfig,
  StaircaseConfig,
  TextConfig,
  TrainConfig,
  VisionTowerConfig,
)
from wallwm_jax.data import moments, traces
from wallwm_jax.data.build import build_store
from wallwm_jax.data.pipeline import PlanSource, make_dataset
from wallwm_jax.data.schema import CaptionSpan, EventSpan
from wallwm_jax.data.store import EventStore
from wallwm_jax.data.transforms import Draw
from wallwm_jax.types import CheckpointError, ConfigError, NormStats, Prompt

NORM = NormStats(
  *(np.full(n, v, np.float32) for n, v in [(10, 0), (10, 1), (10, 0.5), (10, 2), (96, 0), (96, 1)])
)
VLM = QwenConfig(vocab=256, layer_types=('full',) * 2, vision=VisionTowerConfig(layers=0))
LANGUAGE = LanguageConfig(
  kind='qwen',
  vlm=VLM,
  reader=VLM,
  staircase=StaircaseConfig(latents=1, relay_depth=1),
  prompt_tokens=64,
  answer_tokens=40,
  trace_tokens=160,
)
# Frames 0..8, 8..24, 24..33, 33..39; the third attempt fails.
EVENTS = (
  EventSpan(0, 9, 'reach', {'L1': 'reach the red cube'}),
  EventSpan(8, 25, 'grasp', {'L1': 'grasp the red cube'}),
  EventSpan(24, 34, 'miss', {'L1': 'fail to lift the red cube'}, ('failed',)),
  EventSpan(33, 40, 'lift', {'L1': 'lift the red cube'}, ('recovery',)),
)
TASK = 'Pick up the red cube.'


class ByteTexts:
  """Texts as their UTF-8 bytes; a prompt is the bare instruction."""

  def _batch(self, texts, size):
    ids, mask = np.zeros((len(texts), size), np.int32), np.zeros((len(texts), size), bool)
    for row, text in enumerate(texts):
      ids[row, : len(text)], mask[row, : len(text)] = list(text.encode()), True
    return Prompt(ids, mask)

  def prompts(self, texts):
    return self._batch(texts, LANGUAGE.prompt_tokens)

  def answers(self, texts):
    return self._batch([f'plan: {text}' for text in texts], LANGUAGE.answer_tokens)

  def traces(self, texts):
    return self._batch(texts, LANGUAGE.trace_tokens)


def said(prompt):
  return bytes(np.asarray(prompt.ids)[np.asarray(prompt.mask)].astype(np.uint8).tolist()).decode()


def make_config(stage='4', size=(16, 16), **data):
  data = {'batch_size': 4, 'buckets': (2, 4), 'threads': 0} | data
  return ExperimentConfig(
    model=ModelConfig(image_size=size, text=TextConfig(tokens=1, width=1)),
    language=LANGUAGE,
    data=DataConfig(**data),
    train=TrainConfig(stage=stage),
  )


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  path = tmp_path_factory.mktemp('moments') / 's'
  made = [
    make_episode(i, lengths=(40,), events=EVENTS, captions=(CaptionSpan('L3', 0, 40, TASK),))
    for i in range(8)
  ]
  build_store(made, path, heldout=0.25, progress=False)
  return EventStore(path)


def make_reader(store, **config):
  return moments.make_moment_reader(make_config(**config), store, NORM, encode_text, ByteTexts())


def take(config, store, count, **hosts):
  stream = moments.make_moments(config, store, NORM, encode_text, ByteTexts(), **hosts)
  batches = list(itertools.islice(stream, count))
  stream.close()
  return batches


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_a_moment_field_by_field(store):
  episode = 3
  event, frame = 4 * episode + 1, 12  # inside 'grasp', frames 8..24 at 10 Hz
  moment = make_reader(store)(Draw(event, 0, frame, 0))
  info = store.info(episode)
  raw = store.frames(episode, np.array([frame]), info.views)
  for view, name in enumerate(('front', 'side', 'wrist')):
    np.testing.assert_array_equal(moment.frames[view], raw[name][0])
  np.testing.assert_allclose(moment.state, (info.state[frame] - 0.5) / 2, rtol=1e-6)
  assert moment.view_mask.tolist() == [True] * 3
  assert said(moment.prompt) == 'pick up the red cube'
  assert said(moment.answer) == 'plan: grasp the red cube'
  facts = traces.Facts(
    task='pick up the red cube',
    done='reach the red cube',
    next='grasp the red cube',
    where=traces.goal_words(info.state[frame], info.state[24], 'synthetic'),
  )
  assert said(moment.trace) == traces.trace(facts, 0)
  assert moment.remaining == np.float32(1.2) and moment.duration == np.float32(1.6)
  bank = moments.caption_bank(store)
  assert bank[moment.caption] == 'grasp the red cube'
  assert moment.text.features.tolist() == encode_text(['grasp the red cube']).features[0].tolist()
  uid = (int(store.column('uid')[event]) + 4) % 2**64
  assert moment.uid.tolist() == [uid & 0xFFFFFFFF, uid >> 32]


def test_what_was_done_skips_failed_attempts_and_ends_with_the_episode(store):
  words = moments.Words(store, make_config())
  got = [words.facts(Draw(event, 0, 0)).done for event in (0, 1, 2, 3, 4, 5)]
  assert got == ['', 'reach the red cube', 'grasp the red cube', 'grasp the red cube', '',
                 'reach the red cube']


def test_batches_have_the_shapes_of_the_config(store):
  config = make_config()
  (batch,) = take(config, store, 1)
  want = config.inputs_spec()
  assert jax.tree.structure(batch) == jax.tree.structure(want)
  for (path, got), spec in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(want)):
    assert (got.shape, got.dtype) == (spec.shape, spec.dtype), path


def test_moments_of_other_sizes_are_letterboxed(store):
  moment = make_reader(store, size=(16, 32))(Draw(0, 0, 5))
  assert moment.frames.shape == (3, 16, 32, 3)
  assert (moment.frames[:, :, :8] == 0).all() and (moment.frames[:, :8, 8:24] == 5).all()


def test_only_events_that_succeed_are_drawn_at_all_their_frames_but_the_last(store):
  config = make_config(batch_size=16, balance=0.0)
  events = moments.plan_events(store, config)
  train = store.column('split') == 'train'
  assert set(events) == {e for e in range(32) if train[e] and e % 4 != 2}
  source = PlanSource(store, config, 1, moments=events)
  offsets, choices = collections.defaultdict(set), set()
  for draw in (source[i] for i in range(6000)):
    offsets[draw.event].add(draw.anchor)
    choices.add(draw.choice)
  start, end = store.column('start'), store.column('end')
  first = [source[i].anchor == start[source[i].event] for i in range(96)]
  assert all(first[16:32] + first[48:64]) and not all(first[:16] + first[32:48])
  assert {e: offsets[e] for e in offsets} == {
    int(e): set(range(start[e], end[e] - 1)) for e in events
  }
  assert len(choices) > 5980


def test_wordings_follow_the_config(store):
  asked = {
    kind: {
      said(Prompt(ids, mask))
      for batch in take(make_config(phrasing=kind), store, 40)
      for ids, mask in zip(batch.prompt.ids, batch.prompt.mask)
    }
    for kind in ('canonical', 'train', 'heldout')
  }
  assert asked['canonical'] == {traces.plain(TASK)}
  train, heldout = traces.phrasings(TASK)
  assert asked['train'] == set(train) and asked['heldout'] == set(heldout)


def test_same_wording_and_facts_give_the_same_trace(store):
  """A trace may not depend on anything that the model is not given."""
  reader = make_reader(store)
  source = PlanSource(
    store, make_config(), 1, moments=moments.plan_events(store, make_config())
  )
  seen = {}
  for draw in (source[i] for i in range(2000)):
    key = reader.words.instruction(draw), reader.words.facts(draw)
    text = reader.words.trace(draw)
    assert seen.setdefault(key, text) == text
  assert len(seen) < 500


def test_stage_vlm_mixes_traces_and_timed_plans(store):
  batches = take(make_config(stage='vlm'), store, 100)
  told = [said(Prompt(i, m)) for b in batches for i, m in zip(b.trace.ids, b.trace.mask)]
  plans = [text for text in told if text.startswith('plan: ')]
  assert 160 < len(plans) < 240
  assert all(text.startswith('think: ') for text in {*told} - {*plans})
  remaining = [float(r) for b in batches for r in b.remaining]
  for text, left in zip(told, remaining):
    if text.startswith('plan: '):
      assert text.endswith(f'; {round(10 * left):02d} tenths')


@pytest.mark.parametrize('stage', ['4', 'vlm'])
def test_resume_continues_with_the_identical_batch(store, stage):
  config = make_config(stage=stage)
  want = take(config, store, 8)
  stream = moments.make_moments(config, store, NORM, encode_text, ByteTexts())
  for _ in range(5):
    next(stream)
  state = json.loads(json.dumps(stream.get_state()))
  fresh = moments.make_moments(config, store, NORM, encode_text, ByteTexts())
  next(fresh)
  fresh.set_state(state)
  assert_equal([next(fresh) for _ in range(3)], want[5:])


def test_hosts_share_the_global_batch(store):
  config = make_config()
  whole = take(config, store, 4)
  parts = [take(config, store, 4, process_index=i, process_count=2) for i in range(2)]
  joined = [jax.tree.map(lambda *x: np.concatenate(x), *pair) for pair in zip(*parts)]
  assert_equal(joined, whole)


@pytest.mark.slow
def test_worker_processes_do_not_change_moments(store):
  assert_equal(take(make_config(workers=2), store, 4), take(make_config(), store, 4))


def test_the_state_of_a_stream_of_windows_does_not_fit(store):
  windows = make_dataset(make_config(), store, NORM, encode_text)
  stream = moments.make_moments(make_config(), store, NORM, encode_text, ByteTexts())
  with pytest.raises(CheckpointError, match='moments'):
    stream.set_state(windows.get_state())
  other = moments.make_moments(
    make_config(phrasing='heldout'), store, NORM, encode_text, ByteTexts()
  )
  with pytest.raises(CheckpointError, match="'train' then, 'heldout' now"):
    other.set_state(stream.get_state())


def test_moments_for_evaluation_are_one_per_event(store):
  config = make_config(split='heldout')
  start, end = store.column('start'), store.column('end')
  events = moments.plan_events(store, config)
  for where in ('start', 'random'):
    draws = moments.moment_draws(config, store, where=where)
    assert [draw.event for draw in draws] == events.tolist()
    assert all(start[d.event] <= d.anchor < end[d.event] - 1 for d in draws)
    assert all(d.anchor == start[d.event] for d in draws) == (where == 'start')
    batches = list(
      moments.moment_batches(config, store, NORM, encode_text, ByteTexts(), where=where)
    )
    assert [len(batch.caption) for batch in batches] == [4, 2]
    left = np.concatenate([batch.remaining for batch in batches])
    np.testing.assert_allclose(left, [(end[d.event] - 1 - d.anchor) / 10 for d in draws], rtol=1e-6)
  assert len(moments.moment_draws(config, store, where='start', limit=3)) == 3


def test_windows_can_carry_prompts(store):
  config = make_config(stage='1', phrasing='heldout')
  stream = make_dataset(config, store, NORM, encode_text, ByteTexts().prompts)
  batch, plain = next(stream), next(make_dataset(config, store, NORM, encode_text))
  assert plain.prompt is None
  np.testing.assert_array_equal(batch.frames, plain.frames)
  for ids, mask in zip(batch.prompt.ids, batch.prompt.mask):
    assert said(Prompt(ids, mask)) in traces.phrasings(TASK).heldout


def test_the_bank_is_sorted_distinct_and_of_all_splits(store, tmp_path):
  assert moments.caption_bank(store) == [
    'grasp the red cube', 'lift the red cube', 'reach the red cube'
  ]
  other = make_store(tmp_path / 's', episodes=4, heldout=0.25)
  assert len(moments.caption_bank(other)) == 12


def test_texts_for_a_tokenizer_are_training_texts(store):
  texts = moments.tokenizer_texts(store, make_config(phrasing='heldout'))
  assert len(texts) == 2 * 18 * 3
  assert set(texts[::3]) <= set(traces.phrasings(TASK).train)
  assert texts == moments.tokenizer_texts(store, make_config())


def test_a_split_without_a_plan_is_refused(tmp_path):
  events = (EventSpan(0, 40, 'miss', {'L1': 'fail to lift it'}, ('failed',)),)
  build_store([make_episode(0, lengths=(40,), events=events)], tmp_path / 's', progress=False)
  with pytest.raises(ConfigError, match="data.split='train': none of its 1 events"):
    take(make_config(), EventStore(tmp_path / 's'), 1)


def test_events_without_states_have_no_direction(tmp_path):
  episode = make_episode(0, lengths=(40,), events=EVENTS, state=None, actions=None)
  build_store([episode], tmp_path / 's', heldout=0, progress=False)
  moment = make_reader(EventStore(tmp_path / 's'))(Draw(0, 0, 3))
  assert 'goal: unknown.' in said(moment.trace)
  assert (moment.state == 0).all()


def test_chunk_windows_leave_moments_as_they_are(store):
  config = make_config(buckets=(2,))
  chunk = dataclasses.replace(config, data=dataclasses.replace(config.data, window='chunk'))
  reader = [
    moments.make_moment_reader(c, store, NORM, encode_text, ByteTexts()) for c in (config, chunk)
  ]
  assert_equal([reader[0](Draw(1, 0, 10))], [reader[1](Draw(1, 0, 10))])
