"""The tokenizer.json of a T5-like encoder."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from wallwm_jax.types import CheckpointError

_END = '</s>'
_PAD = '<pad>'


def load_tokenizer(
  path: pathlib.Path | str, vocab: int, *, missing: str, model: str
) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
  """(the tokenizer of a tokenizer.json, its tokens with their ids).

  Args:
    vocab: rows of the model's embedding. missing, model: what the errors for an absent file and for
      ids beyond `vocab` say.

  Raises:
    CheckpointError: no such file, no tokenizer, or ids beyond `vocab`.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise CheckpointError(f'{path}: no such file; {missing}')
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise CheckpointError(
      f'{path}: expected a tokenizer.json of the `tokenizers` library, got {error}.'
    ) from None
  # A file may carry the padding and truncation of its last use.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  ids = tokenizer.get_vocab(with_added_tokens=True)
  last = max(ids, key=ids.__getitem__)
  if ids[last] >= vocab:
    raise CheckpointError(
      f'{path}: token {last!r} has id {ids[last]}, but {model.format(vocab=vocab)}. This '
      'tokenizer belongs to another model.'
    )
  return tokenizer, ids


class Tokenizer:
  """Text to token ids that end with `</s>`, as transformers' T5 tokenizers give them.

  Args:
    path: tokenizer.json. vocab: rows of the model's embedding.

  Raises:
    CheckpointError: no such file, no tokenizer, ids beyond `vocab`, or no `</s>`.
  """

  def __init__(self, path: pathlib.Path | str, vocab: int):
    self._tokenizer, ids = load_tokenizer(
      path,
      vocab,
      missing='expected the tokenizer of the text encoder. `wallwm convert umt5 --src SRC --out '
      'DIR` copies it to DIR when SRC (or its sibling tokenizer/) has one.',
      model='the text encoder embeds {vocab} ids (model.text.umt5.vocab)',
    )
    if _END not in ids:
      raise CheckpointError(
        f'{path}: expected a token {_END!r}, which ends every sequence of a T5 encoder; the '
        f'{len(ids)} tokens of this file have none.'
      )
    self.end, self.pad = ids[_END], ids.get(_PAD, 0)

  def encode(self, text: str, length: int) -> list[int]:
    """At most `length` ids (>= 1); a longer text loses its tail, never the final `</s>`."""
    ids = self._tokenizer.encode(text, add_special_tokens=False).ids
    return [*ids[: length - 1], self.end]

  def batch(
    self, rows: Sequence[Sequence[int]], length: int, size: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, mask bool) [size, length] of encoded rows, padded behind and below."""
    ids = np.full((size, length), self.pad, np.int32)
    mask = np.zeros((size, length), bool)
    for i, row in enumerate(rows):
      ids[i, : len(row)] = row
      mask[i, : len(row)] = True
    return ids, mask
