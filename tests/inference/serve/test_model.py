"""A served model: its answers are those of the model, whoever else asks; sessions; bad requests."""

import jax
import numpy as np
import pytest
from clients import STATE, encode, request, resize

from wallwm_jax.geometry.poses import apply_relative
from wallwm_jax.inference.event import predict_event
from wallwm_jax.inference.serve.engines import ModelEngine
from wallwm_jax.inference.serve.fields import Keys
from wallwm_jax.inference.serve.model import ModelPolicy
from wallwm_jax.types import ConfigError, DataError, Observation


@pytest.fixture(scope='module')
def engine(cfg, params):
  return ModelEngine(cfg, params, bucket=2, max_batch=4)


@pytest.fixture(scope='module')
def event(engine):
  return ModelPolicy(engine, encode, resize)


@pytest.fixture(scope='module')
def chunk(engine):
  return ModelPolicy(engine, encode, resize, modes=['chunk'])


def ask(policy, *requests, memory=None):
  return policy.infer([policy.check(r, memory or policy.start()) for r in requests])


def test_answers_are_the_models(event, cfg, params):
  asked = request(3)
  (reply,) = ask(event, asked)
  frames = np.stack([asked[f'observation/{view}'] for view in cfg.model.views])
  obs = Observation(frames[None, :, None], asked['observation/state'][None], np.ones((1, 2), bool))
  key = jax.random.fold_in(jax.random.key(0), 1)
  chunk = predict_event(params, obs, encode(['lift the cube']), key, cfg=cfg, bucket=2).chunk
  want = apply_relative(np.asarray(asked['observation/state']), np.asarray(chunk.actions[0]))
  np.testing.assert_allclose(reply['actions'], want, rtol=2e-4, atol=2e-4)
  promised = (event.metadata['steps']['event'], event.metadata['action_dim'])
  assert reply['actions'].shape == promised == (8, 10)
  assert reply['event_text'] == 'lift the cube'


def test_an_answer_does_not_depend_on_who_else_asks(event):
  (alone,) = ask(event, request(1))
  together = ask(event, request(0), request(1, size=(32, 32))), ask(event, request(2), request(1))
  np.testing.assert_allclose(together[1][1]['actions'], alone['actions'], rtol=2e-4, atol=2e-4)
  three = ask(event, request(0), request(1), request(2, event='push it'))
  np.testing.assert_allclose(three[1]['actions'], alone['actions'], rtol=2e-4, atol=2e-4)
  assert not np.allclose(three[0]['actions'], alone['actions'], atol=1e-2)


def test_the_text_is_kept_until_another_one_comes(event):
  memory = event.start()
  event.check(request(), memory)
  silent = request()
  del silent['event']
  assert event.check(silent, memory).text == 'lift the cube'
  assert event.check(request(event='push it'), memory).text == 'push it'
  assert event.check(silent, memory).text == 'push it'
  assert event.check(silent | {'prompt': 'tidy up'}, memory).text == 'tidy up'
  with pytest.raises(DataError, match='event: expected a text at least with the first'):
    event.check(silent | {'reset': True}, memory)
  assert event.check(request(), event.start()).session.turn == 1


def test_unified_mode_looks_back_on_what_the_session_saw(chunk):
  """M = 1 history latent = 4 frames before the current one."""
  memory, pictures = chunk.start(), np.arange(12, dtype=np.uint8)

  def seen(*levels, **changes):
    film = np.broadcast_to(pictures[list(levels), None, None, None], (len(levels), 16, 16, 3))
    views = {f'observation/{view}': film for view in ('front', 'wrist')}
    return chunk.check(request(**views, **changes), memory).frames[:, :, 0, 0, 0].tolist()

  assert seen(1) == [[1, 1, 1, 1, 1]] * 2
  assert seen(2, 3) == [[1, 1, 1, 2, 3]] * 2
  assert seen(4, 5, 6, 7) == [[3, 4, 5, 6, 7]] * 2
  assert seen(8, 9, 10, 11, 1, 2) == [[9, 10, 11, 1, 2]] * 2
  assert seen(5, reset=True) == [[5, 5, 5, 5, 5]] * 2
  (reply,) = ask(chunk, request())
  assert np.isfinite(reply['actions']).all() and reply['actions'].shape == (8, 10)


def test_sessions_choose_their_mode(engine, event, chunk):
  both = ModelPolicy(engine, encode, resize, modes=['event', 'chunk'])
  assert both.metadata['modes'] == ['event', 'chunk'] and both.metadata['past_frames'] == 4
  first, second, third = ask(both, request(1), request(2, mode='chunk'), request(3))
  assert [reply['mode'] for reply in (first, second, third)] == ['event', 'chunk', 'event']
  for reply, (want,) in (
    (first, ask(event, request(1))),
    (second, ask(chunk, request(2))),
    (third, ask(event, request(3))),
  ):
    np.testing.assert_allclose(reply['actions'], want['actions'], rtol=2e-4, atol=2e-4)
  memory = both.start()
  both.check(request(mode='chunk'), memory)
  assert both.check(request(), memory).session.mode == 'chunk'
  assert both.check(request(reset=True), memory).session.mode == 'event'
  with pytest.raises(DataError, match=r"mode: expected one of \['event'\], got 'chunk'"):
    event.check(request(mode='chunk'), event.start())


def test_what_is_executed_meanwhile_begins_the_next_chunk(event):
  memory = event.start()
  (first,) = ask(event, request(1), memory=memory)
  (free,) = ask(event, request(2))
  (second,) = ask(event, request(2, executed=2, delay=3), memory=memory)
  np.testing.assert_allclose(second['actions'][:3], first['actions'][2:5], rtol=1e-3, atol=1e-3)
  assert np.abs(second['actions'][3:] - free['actions'][3:]).max() > 1e-3
  third = request(3, executed=5, delay=0)
  assert event.check(third, memory).committed.shape == (0, 10)
  for changes, message in (
    ({'executed': 6, 'delay': 3}, 'executed 6 . delay 3 steps, but the last reply had 8'),
    ({'executed': 1, 'delay': 1.0}, 'delay: expected a number of steps'),
    ({'delay': 1}, 'executed: expected a number of steps'),
    ({'executed': -1, 'delay': 1}, 'executed: expected a number of steps'),
    ({'executed': 1, 'delay': 1, 'reset': True}, 'no last reply'),
  ):
    with pytest.raises(DataError, match=message):
      event.check(request(**changes), memory)


BAD = {
  'missing camera': ({'observation/wrist': None}, r'observation/wrist: missing'),
  'float picture': ({'observation/front': np.zeros((16, 16, 3), np.float32)}, r'got float32 \[16'),
  'channels first': ({'observation/front': np.zeros((3, 16, 16), np.uint8)}, r'got uint8 \[3, 16'),
  'empty picture': ({'observation/front': np.zeros((0, 16, 3), np.uint8)}, r'got uint8 \[0, 16'),
  'other lengths': (
    {'observation/front': np.zeros((5, 16, 16, 3), np.uint8)},
    "as many pictures of every camera, got {'front': 5, 'wrist': 1}",
  ),
  'no state': ({'observation/state': None}, r'observation/state: missing. Expected numbers \[10\]'),
  'another robot': ({'observation/state': np.zeros(7)}, r'numbers \[10\], got float64 \[7\]'),
  'state of texts': ({'observation/state': np.array(['a'] * 10)}, r'got <U1'),
  'NaN': ({'observation/state': np.where(np.arange(10) == 4, np.nan, STATE)}, r'values at \[4\]'),
  'unknown field': ({'observation/wirst': STATE}, "Did you mean 'observation/wrist'"),
  'long text': ({'event': 'x' * 2001}, 'event: expected a text of 1..2000 characters, got 2001'),
  'no text': ({'event': 7}, 'got int'),
  'reset': ({'reset': 1}, 'reset: expected true or false'),
  'other actions': ({'action_dim': 7}, 'action_dim: expected 10, that of this model, got 7'),
  'other statistics': ({'norm_hash': 'ab'}, "norm_hash: expected '[0-9a-f]{16}', .* got 'ab'"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_fields_are_named(chunk, name):
  changes, message = BAD[name]
  asked = {k: v for k, v in (request() | changes).items() if v is not None}
  memory = chunk.start()
  with pytest.raises(DataError, match=message):
    chunk.check(asked, memory)
  assert memory == chunk.start()


def test_settings_that_do_not_fit_are_refused(cfg, params, engine):
  with pytest.raises(ConfigError, match='event bucket'):
    ModelEngine(cfg, params, bucket=9)
  with pytest.raises(ConfigError, match='expected a field for each of'):
    ModelPolicy(engine, encode, resize, keys=Keys({'front': 'image'}))
