"""A person at the terminal: numbers, texts, times, mistakes, silence."""

import io

import numpy as np
import pytest

from wallwm_jax.commands.terminal import Terminal
from wallwm_jax.inference.sources import NOTHING, CaptionTable
from wallwm_jax.types import Text

CAPTIONS = ('push the puck', 'reach the puck', 'lift the puck')
TABLE = CaptionTable(
  Text(np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4), np.ones((3, 2), bool)),
  np.array([9, 2, 4], np.int32),
)


def encode(texts):
  size = (len(texts), 2)
  return Text(np.full((*size, 4), len(texts[0]), np.float64), np.ones(size, bool))


@pytest.fixture
def talk():
  """talk(*lines) -> (requests of as many turns, what was shown); silence after the last line."""

  def run(*lines, turns=None):
    left, shown, prompts = list(lines), [], []

    def read(prompt):
      prompts.append(prompt)
      if not left:
        raise EOFError
      return left.pop(0)

    terminal = Terminal(CAPTIONS, TABLE, encode, 0.05, read, shown.append)
    count = len(lines) if turns is None else turns
    said = [terminal(np.int32(0), np.int32(k), np.int32(10 * k)) for k in range(count)]
    return said, shown, prompts

  return run


def test_known_captions_are_asked_for_by_number_or_by_name(talk):
  said, shown, prompts = talk('1', 'lift the puck', '2; 0.31')
  assert [int(request.caption) for request in said] == [1, 2, 2]
  assert [int(request.length) for request in said] == [2, 4, 7]
  np.testing.assert_array_equal(said[0].text.features, TABLE.text.features[1][None])
  listed = [line.split(None, 1) for line in shown[:3]]
  assert listed == [[str(i), caption] for i, caption in enumerate(CAPTIONS)]
  assert 'push the puck' in shown[3] and prompts[1] == 'turn 1, 0.5 s > '


def test_any_text_is_encoded(talk):
  (request,), _, _ = talk('wave at the crowd ; 1')
  assert (request.caption, request.length) == (NOTHING, 20)
  assert request.text.features.dtype == np.float32 and request.text.features[0, 0, 0] == 17


def test_enter_and_silence_repeat_what_was_said_last(talk):
  said, _, _ = talk('', '1', '', turns=5)
  assert [int(request.caption) for request in said] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
  'line, message',
  [('7', 'up to 2, got 7'), ('1; soon', 'seconds > 0'), ('1; -2', 'seconds > 0'),
   ('1; inf', 'seconds > 0'), ('; 2', 'a number or a text')],
)  # fmt: skip
def test_mistakes_are_named_and_asked_again(talk, line, message):
  said, shown, prompts = talk(line, '1', turns=1)
  assert int(said[0].caption) == 1 and message in shown[-1] and len(prompts) == 2


def test_the_list_is_shown_again(talk):
  _, shown, _ = talk('?', '1', turns=1)
  assert sum(line.endswith('lift the puck') for line in shown) == 2


def test_only_the_result_goes_to_stdout(monkeypatch, capsys):
  monkeypatch.setattr('sys.stdin', io.StringIO('2\n'))
  request = Terminal(CAPTIONS, TABLE, encode, 0.05)(np.int32(0), np.int32(0), np.int32(0))
  out, err = capsys.readouterr()
  assert int(request.caption) == 2 and out == '' and 'turn 0, 0.0 s > ' in err
