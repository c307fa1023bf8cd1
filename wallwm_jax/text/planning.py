"""Prompts, plans and traces as token ids: how a VLM is asked what to do next, and what it answers.

  <|im_start|>user
  <|vision_start|><|image_pad|>...<|vision_end|>      once per camera
  state 00 00 00 00                                  two digits per channel, filled in later
  task: put the red cube on the blue zone
  <|im_end|>
  <|im_start|>assistant
  plan: lift the red cube;<|im_end|>                 or: think: ...<|im_end|>

All prompts of a config begin with the same tokens, up to the instruction; what follows is text. So
one layout holds for all of them.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from wallwm_jax.config import ActionSpec, ExperimentConfig, LanguageConfig
from wallwm_jax.text.chat import (
  END,
  IMAGE_PAD,
  START,
  VIDEO_PAD,
  VISION_END,
  VISION_START,
  ChatTokenizer,
  rope_positions,
)
from wallwm_jax.types import ConfigError, DataError, Prompt, PromptLayout

PLAN = 'plan:'  # what every plan begins with, before the caption
PAD = '<|endoftext|>'

# The tokenizer that `train_tokenizer` makes has these first, in this order.
SPECIAL = (PAD, START, END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
_PIECES = (  # Qwen3.5's pretokenizer: digits one by one, marks with their letters
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
  r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_SPECIAL = re.compile(r'<\|[^|<>\s]*\|>')
_REMEMBERED = 65_536  # texts of one kind whose tokens are kept


class PlanningTexts:
  """The texts of a config's prompts, answers and traces as fixed-size token ids (NumPy); picklable.

  Args:
    views: cameras of a prompt, image_size: pixels (H, W) the VLM sees of each.
    action_spec: whose positions and grippers a prompt tells.

  Attributes:
    end: id of the token that ends an answer.

  Raises:
    ConfigError: a tokenizer, an image size or a prompt length that does not fit the config.
  """

  def __init__(
    self,
    tokenizer: ChatTokenizer,
    config: LanguageConfig,
    views: int,
    image_size: tuple[int, int],
    action_spec: ActionSpec,
  ):
    self._tokenizer, self._config = tokenizer, config
    self._sizes = {
      name: getattr(config, name) for name in ('prompt_tokens', 'answer_tokens', 'trace_tokens')
    }
    self.end, self._pad = tokenizer.token_id(END), tokenizer.token_id(PAD)
    self._known: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    groups = action_spec.groups()
    self._channels = sorted(groups['position'] + groups['gripper'])
    self._head, self._types, self._grids = self._begin(views, image_size)
    self._slots = self._find_slots()

  def layout(self) -> PromptLayout:
    """What all prompts share (NumPy). Positions go on behind the instruction, padding included."""
    size, head = self._config.prompt_tokens, len(self._head)
    merge = self._config.vlm.vision.merge
    positions, following = rope_positions(self._types, self._grids, merge)
    behind = np.broadcast_to(following + np.arange(size - head, dtype=np.int32), (3, size - head))
    view = np.full(size, -1, np.int32)
    per_view = sum(self._types) // len(self._grids) if self._grids else 1
    view[np.flatnonzero(self._types)] = np.arange(sum(self._types)) // per_view
    return PromptLayout(
      positions=np.concatenate([positions, behind], 1).astype(np.int32),
      view=view,
      channels=np.array(self._channels, np.int32),
      slots=self._slots,
      digits=np.array([self._tokenizer.token_id(str(digit)) for digit in range(10)], np.int32),
      opening=np.array(self._tokenizer.encode(PLAN), np.int32),
    )

  def prompts(self, instructions: Sequence[str]) -> Prompt:
    """[n, S] of one prompt per instruction; raises as `answers`."""
    return self._batch('prompt_tokens', instructions)

  def answers(self, captions: Sequence[str]) -> Prompt:
    """[n, Y] of one plan per caption.

    Raises:
      ConfigError: tokens beyond the size in the config, naming the text and the field.
      DataError: a text that spells a special token.
    """
    return self._batch('answer_tokens', captions)

  def traces(self, texts: Sequence[str]) -> Prompt:
    """[n, M] of texts as they are, their end marked; raises as `answers`."""
    return self._batch('trace_tokens', texts)

  def text(self, ids: Sequence[int]) -> str:
    """The text of generated ids up to the end mark."""
    ids = itertools.takewhile(lambda i: i not in (self.end, self._pad), map(int, ids))
    return self._tokenizer.decode(list(ids))

  def _begin(self, views: int, image_size: tuple[int, int]):
    """(ids of a prompt up to the instruction, their types, grids of the images)."""
    vlm, (height, width) = self._config.vlm, image_size
    image, factor = self._tokenizer.token_id(IMAGE_PAD), vlm.vision.factor
    if image != vlm.image_token:
      raise ConfigError(
        f'language.vlm.image_token: expected {image}, the id of {IMAGE_PAD} in this tokenizer, got '
        f'{vlm.image_token}.'
      )
    if height % factor or width % factor:
      raise ConfigError(
        f'language.image_size: expected multiples of {factor} pixels (one token of the VLM), got '
        f'{image_size}. Empty, it is model.image_size.'
      )
    per_view = (height // factor) * (width // factor)
    camera = f'{VISION_START}{IMAGE_PAD * per_view}{VISION_END}'
    state = ' '.join(['state', *['00'] * len(self._channels)])
    ids = self._tokenizer.encode(f'{START}user\n{camera * views}{state}\n')
    if len(ids) >= self._config.prompt_tokens:
      raise ConfigError(
        f'language.prompt_tokens={self._config.prompt_tokens}: {views} images of {per_view} tokens '
        f'and the state take {len(ids)}, and the instruction needs some. Raise it, or lower '
        'language.image_size.'
      )
    grid = (1, height // vlm.vision.patch, width // vlm.vision.patch)
    return ids, [int(i == image) for i in ids], (grid,) * views

  def _find_slots(self) -> np.ndarray:
    """int32 [A', 2]: where the digits of the state stand."""
    zero = self._tokenizer.token_id('0')
    slots = np.flatnonzero(np.array(self._head) == zero)
    if len(slots) != 2 * len(self._channels):
      raise ConfigError(
        f'the tokenizer of language.vlm.weights: expected one token per digit, but '
        f'{2 * len(self._channels)} digits of a state have {len(slots)} tokens "0".'
      )
    return slots.reshape(-1, 2).astype(np.int32)

  def _batch(self, field: str, texts: Sequence[str]) -> Prompt:
    rows = [self._row(field, text) for text in texts]
    empty = np.zeros((0, self._sizes[field]))
    ids = np.stack([ids for ids, _ in rows]) if rows else empty.astype(np.int32)
    mask = np.stack([mask for _, mask in rows]) if rows else empty.astype(bool)
    return Prompt(ids, mask)

  def _row(self, field: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of one text, padded to the size that `field` of the config says."""
    if (field, text) not in self._known:
      if len(self._known) >= _REMEMBERED:
        self._known.clear()
      self._known[field, text] = self._encode(field, text)
    return self._known[field, text]

  def _encode(self, field: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    if found := _SPECIAL.search(text):
      raise DataError(f'{text!r}: an instruction or caption may not spell the token {found[0]}.')
    match field:
      case 'prompt_tokens':
        asked = f'task: {text}\n{END}\n{START}assistant\n'
        ids = self._head + self._tokenizer.encode(asked)
      case 'answer_tokens':
        # The time that a plan takes would follow: its end asks for it.
        ids = self._tokenizer.encode(f'{PLAN} {text};{END}')
      case _:
        ids = self._tokenizer.encode(f'{text}{END}')
    size = self._sizes[field]
    if len(ids) > size:
      raise ConfigError(
        f'language.{field}={size}: {text!r} takes {len(ids)} tokens. Raise language.{field} to at '
        f'least {len(ids)}, or shorten the text.'
      )
    row = np.full(size, self._pad, np.int32)
    row[: len(ids)] = ids
    return row, np.arange(size) < len(ids)


def make_planning_texts(config: ExperimentConfig) -> PlanningTexts:
  """The texts of a config, with the tokenizer beside the VLM's weights.

  Raises:
    ConfigError: config.language.vlm.weights names no folder, or the tokenizer does not fit.
    CheckpointError: no tokenizer in that folder.
  """
  vlm = config.language.vlm
  if not vlm.weights:
    raise ConfigError(
      'language.vlm.weights: expected the folder of a VLM with its tokenizer.json, got none. Make '
      'one: wallwm convert qwen --src DIR --out FOLDER.'
    )
  tokenizer = ChatTokenizer(pathlib.Path(vlm.weights) / 'tokenizer.json', vlm.vocab)
  size = config.language.image_size or config.model.image_size
  return PlanningTexts(
    tokenizer, config.language, len(config.model.views), size, config.model.action_spec
  )


def train_tokenizer(texts: Iterable[str], path: pathlib.Path | str, vocab: int) -> None:
  """A byte-level BPE tokenizer as Qwen3.5's, of at most `vocab` tokens, as the file `path`: special
  tokens first, then bytes, then what is frequent in `texts` and in the prompts around them.

  The same texts, in any order, give the same bytes.

  Raises:
    ConfigError: a vocabulary that does not hold the special tokens and all bytes.
  """
  if vocab < len(SPECIAL) + 256:
    raise ConfigError(
      f'vocab: expected >= {len(SPECIAL) + 256} tokens (special tokens and all bytes), got {vocab}.'
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PIECES), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab,
    special_tokens=list(SPECIAL),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  texts = sorted(texts)
  around = ['user\nstate 00 00 00 00\ntask: plan: \nassistant\n'] * len(texts)
  tokenizer.train_from_iterator(texts + around, trainer)
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(path))
