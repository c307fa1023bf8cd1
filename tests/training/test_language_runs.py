"""The five stages in a row on a tiny store: what each leaves behind is what the next one needs."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from wallwm_jax import cli, weights
from wallwm_jax.commands import serve, tiny_vlm
from wallwm_jax.commands.language_scores import Moments, evaluate, reasonings
from wallwm_jax.data.moments import caption_bank
from wallwm_jax.data.store import EventStore
from wallwm_jax.models.vlm.layers import slice_layers
from wallwm_jax.text.factory import make_text_encoder
from wallwm_jax.text.planning import make_planning_texts
from wallwm_jax.training import loop, pretrained
from wallwm_jax.training.checkpoints import load_inference
from wallwm_jax.types import CheckpointError, ConfigError

pytestmark = pytest.mark.usefixtures('plain_states')
SIZES = {'prompt_tokens': 128, 'answer_tokens': 32, 'trace_tokens': 160}


def staged(tiny, stage, store, folder, window='event', source='', **sections):
  """A config of two steps whose weights lie in `folder`."""
  sections.setdefault('optim', {'lr': 1e-9})  # what is inherited stays recognisable
  train = {'steps': 2, 'init_from': str(source)} | sections.pop('train', {})
  config = tiny.language(stage, window, store, str(folder), train=train, **sections)
  return dataclasses.replace(config, language=dataclasses.replace(config.language, **SIZES))


@pytest.fixture(scope='module')
def made(tiny, store, tmp_path_factory, plain_states):
  """(weights folder, workdir) of stage 'vlm'."""
  folder, workdir = tmp_path_factory.mktemp('weights'), tmp_path_factory.mktemp('vlm')
  tiny_vlm.make(staged(tiny, 'vlm', store, folder), workdir, progress=False)
  return folder, workdir


@pytest.mark.slow
def test_five_stages_in_a_row(tiny, store, made, tmp_path):
  folder, _ = made

  def run(stage, previous='', **options):
    config = staged(tiny, stage, store, folder, source=previous, **options)
    loop.train(config, tmp_path / stage, progress=False)
    return tmp_path / stage

  run('2')
  run('3', tmp_path / '2')
  run('4', tmp_path / '3')
  run('5', tmp_path / '4', window='chunk', data={'text': 'staircase'})

  bank = caption_bank(EventStore(store))
  assert bank == ['come back', 'go there']
  config, params = load_inference(tmp_path / '4', captions=bank)
  side = config.language
  upper = slice_layers(
    params.frozen.language.vlm['text']['layers'], side.vlm.layer_types,
    side.staircase.relay_depth, side.vlm.layers,
  )
  jax.tree.map(
    lambda ours, vlm: np.testing.assert_allclose(ours, vlm, atol=1e-6),
    params.model['staircase']['layers'], upper,
  )
  _, last = load_inference(tmp_path / '5', captions=bank)
  for part in ('heads', 'staircase', 'projector'):  # stage 5 leaves them alone
    jax.tree.map(np.testing.assert_array_equal, last.model[part], params.model[part])

  seen = Moments(config, params, EventStore(store), split='train')
  scores = evaluate(seen)
  assert scores['plans']['event starts']['n'] == 12
  assert 0 <= scores['traces']['heldout']['token_accuracy'] <= 1
  json.dumps(scores)
  thoughts = reasonings(dataclasses.replace(seen, limit=2))
  assert len(thoughts) == 2 and 'wander' in thoughts[0].trace
  assert thoughts[0].frames.shape == (2, 16, 32, 3)

  # Behind the server each run is told as it was trained, and may be told otherwise.
  for stage, source in (('4', 'instruction'), ('5', 'staircase')):
    words = ['serve', '--workdir', str(tmp_path / stage), '--store', str(store), '--modes', 'chunk']
    policy = serve.make_policy(cli.make_parser().parse_args(words))
    spoken = ['planner', 'conditioned', 'staircase']
    assert policy.metadata['sources'] == ['atomic', 'instruction', *spoken]
    fields = policy.metadata['fields']
    asked = {name: np.zeros((24, 40, 3), np.uint8) for name in fields['views'].values()}
    asked |= {fields['state']: seen.store.info(0).state[0], 'prompt': 'go there'}
    memory = policy.start()
    (reply,) = policy.infer([policy.check(asked, memory)])
    assert reply['source'] == source
    (reply,) = policy.infer([policy.check(asked | {'source': 'planner'}, memory)])
    assert reply['event_text'] in bank and reply['remaining_steps'] > 0


@pytest.mark.slow
def test_what_is_made_is_not_made_again(tiny, store, made):
  folder, workdir = made
  before = weights.digest(folder / 'vlm'), weights.digest(folder / 'reader')
  result = tiny_vlm.make(staged(tiny, 'vlm', store, folder), workdir, progress=False)
  assert result.step == 2
  assert (weights.digest(folder / 'vlm'), weights.digest(folder / 'reader')) == before


def side_of(config, store):
  text, texts = make_text_encoder(config.model.text), make_planning_texts(config)
  return pretrained.load_language(config, caption_bank(EventStore(store)), text, texts)


@pytest.mark.slow
def test_weights_of_another_model_are_refused(tiny, store, made):
  folder, _ = made
  config = staged(tiny, '3', store, folder)
  assert side_of(config, store).bank.shape == (2, 8)
  vlm = dataclasses.replace(config.language.vlm, rope_theta=50.0)
  other = dataclasses.replace(config, language=dataclasses.replace(config.language, vlm=vlm))
  with pytest.raises(CheckpointError, match=r'rope_theta: expected 50.0, got 100.0'):
    side_of(other, store)


def test_a_vlm_without_a_folder_is_refused(tiny, store):
  config = staged(tiny, '3', store, '')
  with pytest.raises(ConfigError, match=r'language.vlm.weights.*wallwm convert qwen'):
    make_planning_texts(config)


def test_a_run_without_heads_cannot_plan(tiny, store, tmp_path):
  config = tiny.config('1', store=store, train={'steps': 1})
  loop.train(config, pathlib.Path(tmp_path), progress=False)
  with pytest.raises(ConfigError, match='stages 3 and 4'):
    load_inference(tmp_path, captions=['go there'])
