"""Qwen's chat: its tokenizer, ChatML written out, and prompts with media as ids and positions.

Nothing here reads a checkpoint's chat template: defaults of thinking differ between the sizes of
Qwen3.5, so every prompt says which one it means.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from wallwm_jax.config import QwenConfig, nearest
from wallwm_jax.text.tokenizer import load_tokenizer
from wallwm_jax.types import CheckpointError, ConfigError, DataError

START, END = '<|im_start|>', '<|im_end|>'
VISION_START, VISION_END = '<|vision_start|>', '<|vision_end|>'
IMAGE_PAD, VIDEO_PAD = '<|image_pad|>', '<|video_pad|>'
_SPECIAL = re.compile(r'<\|[^|<>\s]*\|>')
_THINK = {'none': '', 'open': '<think>\n', 'closed': '<think>\n\n</think>\n\n'}

Thinking = Literal['none', 'open', 'closed']
Role = Literal['system', 'user', 'assistant']
Grid3 = tuple[int, int, int]


class ChatTokenizer:
  """Text to ids and back with the tokenizer.json of a Qwen model; nothing is added at either end.

  Special tokens that are written out, such as `<|im_end|>`, become their ids.

  Args:
    path: tokenizer.json. vocab: rows of the model's embedding.

  Raises:
    CheckpointError: no such file, no tokenizer, ids beyond `vocab`, or no ChatML tokens.
  """

  def __init__(self, path: pathlib.Path | str, vocab: int):
    self._tokenizer, self._ids = load_tokenizer(
      path,
      vocab,
      missing='expected the tokenizer of the VLM. `wallwm convert qwen --src SRC --out DIR` copies '
      'it to DIR when SRC has one.',
      model='the VLM embeds {vocab} ids (language.vlm.vocab)',
    )
    if absent := [token for token in (START, END) if token not in self._ids]:
      raise CheckpointError(
        f'{path}: expected the tokens of a chat, {START} and {END}; the {len(self._ids)} tokens of '
        f'this file lack {", ".join(absent)}.'
      )
    self.size = 1 + max(self._ids.values())

  def encode(self, text: str) -> list[int]:
    """DataError: text that is no Unicode (a lone surrogate)."""
    try:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError):
      raise DataError(f'{text!r}: expected Unicode text, got a lone surrogate.') from None

  def decode(self, ids: Sequence[int]) -> str:
    """Special tokens written out; bytes that are no UTF-8 become U+FFFD."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

  def token_id(self, token: str) -> int:
    """Id of one token, as it is written; ConfigError names the nearest where there is none."""
    if token not in self._ids:
      special = [t for t in self._ids if _SPECIAL.fullmatch(t)]
      raise ConfigError(f'{token!r} is no token of this tokenizer.{nearest(token, special)}')
    return self._ids[token]


@dataclasses.dataclass(frozen=True)
class Image:
  """Where an image stands in a message."""


@dataclasses.dataclass(frozen=True)
class Video:
  """Where a video stands; times: seconds of each of its merged frames (`media.timestamps`)."""

  times: tuple[float, ...]


class Message(NamedTuple):
  """One turn; content: text, or texts and media in order."""

  role: Role
  content: str | Sequence[str | Image | Video]


def render(messages: Sequence[Message], *, thinking: Thinking) -> str:
  """ChatML of a conversation, opened for the assistant's answer unless the last turn is its own.

  Args:
    thinking: what the opened answer starts with: 'closed' an empty block of thought, 'open' the
      beginning of one, 'none' nothing.

  Raises:
    ConfigError: an unknown role or way of thinking. DataError: no messages, or text that spells a
      special token.
  """
  if thinking not in _THINK:
    raise ConfigError(f'thinking: expected one of {[*_THINK]}, got {thinking!r}.')
  if not messages:
    raise DataError('expected at least one message, got none.')
  turns = []
  for message in map(Message._make, messages):
    if message.role not in Role.__args__:
      known = nearest(message.role, Role.__args__)
      raise ConfigError(f'role of a message: expected a known one, got {message.role!r}.{known}')
    parts = [message.content] if isinstance(message.content, str) else message.content
    turns.append(f'{START}{message.role}\n{"".join(map(_part, parts))}{END}\n')
  if messages[-1][0] != 'assistant':
    turns.append(f'{START}assistant\n{_THINK[thinking]}')
  return ''.join(turns)


def _part(part: str | Image | Video) -> str:
  match part:
    case Image():
      return f'{VISION_START}{IMAGE_PAD}{VISION_END}'
    case Video():
      frame = f'{VISION_START}{VIDEO_PAD}{VISION_END}'
      return ''.join(f'<{time:.1f} seconds>{frame}' for time in part.times)
    case str():
      if found := _SPECIAL.search(part):
        raise DataError(
          f'{part!r}: text of a message may not spell a special token such as {found[0]}; media go '
          'between the texts, as Image() and Video(times).'
        )
      return part
  raise DataError(f'part of a message: expected text, Image or Video, got {type(part).__name__}.')


class EncodedChat(NamedTuple):
  """A prompt with its placeholders expanded.

  ids, types: [S] int32, types 0 text, 1 image, 2 video. grids: (1, rows, columns) in patches of
  every image and video frame in order. positions: [3, S] int32 rotary positions (time, row,
  column); next_position: of the token after the prompt.
  """

  ids: Int[np.ndarray, 'S']
  types: Int[np.ndarray, 'S']
  grids: tuple[Grid3, ...]
  positions: Int[np.ndarray, '3 S']
  next_position: int


def encode_chat(
  tokenizer: ChatTokenizer,
  config: QwenConfig,
  text: str,
  grids: Sequence[Grid3] = (),
  *,
  limit: int,
) -> EncodedChat:
  """ChatML with one placeholder per image and per merged frame of a video, as a model reads it.

  Args:
    text: of `render`. grids: (frames, rows, columns) in patches of every image and video, in the
      order of the text. limit: most tokens that the prompt may have.

  Raises:
    DataError: placeholders and grids that do not match, or sides that do not merge. ConfigError: a
      special token the tokenizer lacks, a tokenizer whose placeholders are not the model's, or more
      than `limit` tokens.
  """
  for token in set(_SPECIAL.findall(text)):
    tokenizer.token_id(token)
  pads = {tokenizer.token_id(IMAGE_PAD): 1, tokenizer.token_id(VIDEO_PAD): 2}
  if tuple(pads) != (config.image_token, config.video_token):
    raise ConfigError(
      f'the tokenizer has {IMAGE_PAD} and {VIDEO_PAD} at {tuple(pads)}, the config at '
      f'{(config.image_token, config.video_token)} (image_token, video_token). They belong to '
      'different models.'
    )
  ids = tokenizer.encode(text)
  frames = _frames([pads[i] for i in ids if i in pads], grids)
  runs = iter(frames)
  expanded, types = [], []
  for i in ids:
    count = _tokens(next(runs), config.vision.merge) if i in pads else 1
    expanded += [i] * count
    types += [pads.get(i, 0)] * count
  if len(expanded) > limit:
    raise ConfigError(
      f'a prompt of {len(expanded)} tokens ({types.count(1) + types.count(2)} of them of images) '
      f'is longer than the {limit} that fit: {text[:80]!r}... Shorten it, shrink its images or '
      'raise the limit.'
    )
  types = np.asarray(types, np.int32)
  positions, following = rope_positions(types, frames, config.vision.merge)
  return EncodedChat(np.asarray(expanded, np.int32), types, tuple(frames), positions, following)


def rope_positions(
  types: Int[np.ndarray, 'S'], grids: Sequence[Grid3], merge: int
) -> tuple[Int[np.ndarray, '3 S'], int]:
  """Rotary positions of a prompt, and that of the token after it.

  Text advances all three axes by one per token. An image (or one frame of a video) keeps time at
  its beginning and counts rows and columns of merged patches from there; what follows begins after
  the longer of its sides.

  Args:
    types: 0 text, 1 image, 2 video; text stands between any two media. grids: (frames, rows,
      columns) in patches in the order of the media; frames of a video may be listed one by one.

  Raises:
    DataError: runs of media tokens that are not what the grids make.
  """
  types = np.asarray(types)
  edges = np.flatnonzero(np.diff(types)) + 1
  runs = [run for run in np.split(np.arange(len(types)), edges) if len(run)]
  frames = iter(_frames([int(types[run[0]]) for run in runs if types[run[0]]], grids))
  positions, cursor = np.zeros((3, len(types)), np.int32), 0
  for run in runs:
    if types[run[0]] == 0:
      positions[:, run] = cursor + np.arange(len(run))
      cursor += len(run)
      continue
    grid = next(frames)
    if len(run) != _tokens(grid, merge):
      raise DataError(
        f'{len(run)} media tokens at {run[0]}: the grid {grid} in patches makes '
        f'{_tokens(grid, merge)} tokens of {merge} x {merge} patches.'
      )
    rows, columns = grid[1] // merge, grid[2] // merge
    row, column = np.divmod(np.arange(rows * columns), columns)
    positions[:, run] = cursor + np.stack([np.zeros_like(row), row, column])
    cursor += max(rows, columns)
  return positions, cursor


def _frames(kinds: Sequence[int], grids: Sequence[Grid3]) -> list[Grid3]:
  """One grid (1, rows, columns) for each run of media, of kind 1 (image) or 2 (video frame)."""
  frames = []
  for grid in grids:
    count, *sides = map(int, grid)
    if count < 1:
      raise DataError(f'grid {tuple(grid)}: expected at least one frame.')
    kind = kinds[len(frames)] if len(frames) < len(kinds) else None
    if kind == 1 and count != 1:
      raise DataError(f'image {len(frames)}: expected a grid of one frame, got {tuple(grid)}.')
    if count > 1 and set(kinds[len(frames) : len(frames) + count]) - {2}:
      raise DataError(f'a video of {count} frames, {tuple(grid)}, stands where an image is due.')
    frames += [(1, *sides)] * count
  if len(frames) != len(kinds):
    raise DataError(
      f'expected one image or video frame per placeholder: {kinds.count(1)} image and '
      f'{kinds.count(2)} video placeholders, but {len(frames)} frames in grids {[*grids]}.'
    )
  return frames


def _tokens(grid: Grid3, merge: int) -> int:
  _, rows, columns = grid
  if rows <= 0 or columns <= 0 or rows % merge or columns % merge:
    raise DataError(
      f'grid {grid}: expected rows and columns of patches in multiples of {merge}, which merge '
      'into one token. Resize the image (media.smart_resize).'
    )
  return (rows // merge) * (columns // merge)
