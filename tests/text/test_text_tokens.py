"""Captions up to token ids, against diffusers' cleaning and transformers' tokenizer."""

import json
import pathlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from wallwm_jax.text.prompt import clean
from wallwm_jax.text.tokenizer import Tokenizer
from wallwm_jax.types import CheckpointError

DATA = pathlib.Path(__file__).parents[1] / 'fixtures' / 'data'
TOKENIZER = DATA / 'umt5_tokenizer.json'
FIXTURE = DATA / 'umt5_text.safetensors'
META = json.loads(safe_open(FIXTURE, 'np').metadata()['config'])


@pytest.mark.parametrize(('raw', 'want'), [*zip(META['raw'], META['clean'], strict=True)])
def test_cleaning_matches_diffusers(raw, want):
  assert clean(raw) == want


@pytest.mark.parametrize('length', META['tokens'])
def test_ids_and_masks_match_transformers(length):
  tensors, tokenizer = load_file(FIXTURE), Tokenizer(TOKENIZER, 95)
  rows = [tokenizer.encode(text, length) for text in META['clean']]
  ids, mask = tokenizer.batch(rows, length, len(rows))
  np.testing.assert_array_equal(ids, tensors[f'outputs.ids_{length}'])
  np.testing.assert_array_equal(mask, tensors[f'outputs.mask_{length}'])
  assert all(row[-1] == tokenizer.end for row in rows)


def test_the_files_own_padding_and_truncation_do_not_count(tmp_path):
  content = json.loads(TOKENIZER.read_text())
  content['truncation'] = {
    'direction': 'Left', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0
  }  # fmt: skip
  content['padding'] = {
    'strategy': {'Fixed': 9}, 'direction': 'Left', 'pad_to_multiple_of': None, 'pad_id': 0,
    'pad_type_id': 0, 'pad_token': '<pad>',
  }  # fmt: skip
  content['post_processor'] = None
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  for text in ('', 'open the drawer', 'reach for the mug and turn the handle'):
    assert Tokenizer(path, 95).encode(text, 99) == Tokenizer(TOKENIZER, 95).encode(text, 99)


def _edited(tmp_path, edit) -> pathlib.Path:
  content = json.loads(TOKENIZER.read_text())
  edit(content)
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  return path


def test_a_missing_file_says_what_to_run(tmp_path):
  with pytest.raises(CheckpointError, match='wallwm convert umt5'):
    Tokenizer(tmp_path / 'tokenizer.json', 95)


def test_another_file_is_refused(tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text('{"model_type": "umt5"}')
  with pytest.raises(CheckpointError, match='expected a tokenizer.json of'):
    Tokenizer(path, 95)


def test_a_larger_vocabulary_is_refused():
  with pytest.raises(CheckpointError, match='has id 94, but the text encoder embeds 94 ids'):
    Tokenizer(TOKENIZER, 94)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
  def rename(content):
    content['post_processor'] = None
    for token in content['added_tokens']:
      token['content'] = token['content'].replace('</s>', '[SEP]')
    for piece in content['model']['vocab']:
      piece[0] = piece[0].replace('</s>', '[SEP]')

  with pytest.raises(CheckpointError, match="expected a token '</s>'"):
    Tokenizer(_edited(tmp_path, rename), 95)
