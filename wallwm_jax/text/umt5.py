"""Captions to UMT5 features, as the public Wan models read them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from wallwm_jax import weights
from wallwm_jax.config import MeshConfig, TextConfig
from wallwm_jax.models import functional
from wallwm_jax.parallel import rules as sharding
from wallwm_jax.parallel.constraints import activation_sharding
from wallwm_jax.text import cache as caches
from wallwm_jax.text.prompt import clean
from wallwm_jax.text.tokenizer import Tokenizer
from wallwm_jax.types import CheckpointError, Params, Text, path_string

_BATCH = 8  # captions of one call of the encoder
_SHORTEST = 64  # tokens; calls are this long, or a power of two times as long, at most X
_REMEMBER = 256 << 20  # bytes of features kept in memory


class UMT5TextEncoder:
  """Features of the cleaned, tokenised captions; the encoder runs only for those that neither
  memory nor the cache has, and its weights are read when the first of them comes.

  Features are what the cache holds, rounded to `umt5.dtype`, whether they were cached or not: a run
  with a warm cache sees the bits of a run with a cold one. A caption's bits do not depend on its
  neighbours either, only on its own length.

  Args:
    config: kind 'umt5'. mesh: devices of this process over which the weights are spread by `rules`
      (`MeshConfig.rules`); None = the first device.

  Raises (from `encode`):
    CheckpointError: captions to encode and no weights, or weights or a tokenizer that do not belong
      to this config.
  """

  def __init__(
    self,
    config: TextConfig,
    *,
    mesh: Mesh | None = None,
    rules: sharding.MeshRules = MeshConfig.rules,
  ):
    self._config, self._mesh, self._rules = config, mesh, rules
    self._recent = caches.RecentFeatures(_REMEMBER)
    self._params: Params | None = None
    self._lock = threading.Lock()

  def encode(self, captions: Sequence[str]) -> Text:
    """Features [B, X, E] float32: a row per token, </s> included, then zeros up to X.

    The mask [B, X] is all True: Wan attends to the zeros. '' is the null prompt, </s> alone.
    """
    texts = [clean(caption) for caption in captions]
    c = self._config
    features = np.zeros((len(texts), c.tokens, c.width), np.float32)
    with self._lock:  # loaders call from several threads
      rows = self._rows(texts)
    for row, text in zip(features, texts):
      row[: len(rows[text])] = rows[text]
    return Text(features=features, mask=np.ones(features.shape[:2], bool))

  def release(self) -> None:
    """Forgets the weights; a caption that is not cached loads them again."""
    with self._lock:
      self._params = None

  def _rows(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows [n, E] of every text."""
    rows, missing = {}, []
    for text in dict.fromkeys(texts):
      found = self._recent.get(text)
      if found is None and self._cache is not None:
        found = self._cache.get(text)
      if found is None:
        missing.append(text)
      else:
        rows[text] = found
        self._recent.put(text, found)
    if missing:
      self._require_weights(missing, len(rows))
      for text, found in self._run(missing):
        rows[text] = found
        self._recent.put(text, found)
        if self._cache is not None:
          self._cache.put(text, found)
    return rows

  def _run(self, texts: Sequence[str]):
    """(text, rows) of texts through the encoder, in calls of one size per length of text."""
    c = self._config
    dtype = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}[c.umt5.dtype]
    groups: dict[int, list[tuple[str, list[int]]]] = {}
    for text in texts:
      ids = self._tokenizer.encode(text, c.tokens)
      groups.setdefault(_call_length(len(ids), c.tokens), []).append((text, ids))
    if self._params is None:
      self._params = self._load()
    size = self._batch_size()
    for length, members in groups.items():
      for start in range(0, len(members), size):
        batch = members[start : start + size]
        ids, mask = self._tokenizer.batch([ids for _, ids in batch], length, size)
        out = np.asarray(self._forward(self._params, *self._place(ids, mask)))
        for (text, real), features in zip(batch, out):
          yield text, features[: len(real)].astype(dtype)

  @functools.cached_property
  def _forward(self):
    def forward(params, ids, mask):
      if self._mesh is None:
        return functional.encode_tokens(params, self._config, ids, mask)
      with activation_sharding(self._mesh, self._rules):
        return functional.encode_tokens(params, self._config, ids, mask)

    return jax.jit(forward)

  def _batch_size(self) -> int:
    """Captions of one call: a multiple of what the mesh splits the batch into."""
    if self._mesh is None:
      return _BATCH
    axes = sharding.mesh_rules(self._rules, self._mesh).get('batch', ())
    parts = math.prod(self._mesh.shape[axis] for axis in axes)
    return parts * -(-_BATCH // parts)

  def _place(self, *arrays: np.ndarray):
    if self._mesh is None:
      return jax.device_put(arrays, SingleDeviceSharding(jax.local_devices()[0]))
    return jax.device_put(arrays, NamedSharding(self._mesh, PartitionSpec()))

  def _load(self) -> Params:
    """The parameters, matrices in the dtype of the matmuls, spread over the mesh."""
    c = self._config
    self._check_manifest()
    shapes = jax.eval_shape(lambda: functional.init_text(c, jax.random.key(0)))
    if self._mesh is None:
      place = SingleDeviceSharding(jax.local_devices()[0])
      placement = jax.tree.map(lambda _: place, shapes)
    else:
      placement = sharding.param_shardings(shapes, self._mesh, self._rules, sharding.UMT5_RULES)

    def target(key_path, leaf, place):
      small = path_string(key_path).endswith(('scale', 'rel_bias/embedding'))
      dtype = jnp.float32 if small else jnp.dtype(c.umt5.dtype)
      return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)

    return weights.load(
      c.weights, 'text', jax.tree_util.tree_map_with_path(target, shapes, placement)
    )

  def _check_manifest(self) -> None:
    """What the shapes of the parameters do not show: epsilon, and how far the buckets reach."""
    stored = weights.read_manifest(self._config.weights, 'text').fields['config']
    ours, theirs = _sizes(self._config), stored['umt5'] | {'width': stored['width']}
    wrong = [
      f'{name}: expected {value!r}, got {theirs.get(name)!r}'
      for name, value in ours.items()
      if theirs.get(name) != value
    ]
    if wrong:
      raise CheckpointError(
        f'text weights {self._config.weights} do not fit model.text ({"; ".join(wrong)}). Set '
        'model.text to the sizes in their manifest.json, or name the weights of this model.'
      )

  def _require_weights(self, missing: Sequence[str], found: int) -> None:
    c = self._config
    if _has_weights(c):
      return
    where = f'in the cache {c.cache!r}' if c.cache else 'cached (model.text.cache is not set)'
    raise CheckpointError(
      f'text encoder: {len(missing)} of {len(missing) + found} captions, {missing[0]!r} first, are '
      f'not {where}, and there are no weights to encode them with: model.text.weights='
      f'{c.weights!r} is no weight folder. Run `wallwm convert umt5 --src SRC --out DIR` and set '
      'model.text.weights=DIR.'
    )

  @functools.cached_property
  def _tokenizer(self) -> Tokenizer:
    return Tokenizer(_tokenizer_path(self._config), self._config.umt5.vocab)

  @functools.cached_property
  def _cache(self) -> caches.FeatureCache | None:
    """The cache of this encoder; None without a folder, or if it holds nothing for a config
    without weights.
    """
    c = self._config
    if not c.cache:
      return None
    identity = _identity(c) or caches.find_identity(c.cache, _settings(c))
    return caches.FeatureCache(c.cache, identity) if identity else None


def _call_length(count: int, tokens: int) -> int:
  """Tokens of the call that encodes `count` of them: few lengths, few traces, little padding."""
  return min(tokens, max(_SHORTEST, 1 << (count - 1).bit_length()))


def _sizes(c: TextConfig) -> dict[str, Any]:
  """What weights and config must agree on."""
  sizes = dataclasses.asdict(c.umt5) | {'width': c.width}
  del sizes['dtype']
  return sizes


def _settings(c: TextConfig) -> dict[str, Any]:
  """The part of an encoder's identity that the config alone gives: no paths."""
  return _sizes(c) | {'dtype': c.umt5.dtype, 'tokens': c.tokens}


def _identity(c: TextConfig) -> caches.Identity | None:
  """What decides every bit of a caption's features; None without weights."""
  if not _has_weights(c):
    return None
  tokenizer = _tokenizer_path(c)
  return {
    'config': _settings(c),
    'weights': weights.digest(c.weights),
    'tokenizer': hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else '',
  }


def _has_weights(c: TextConfig) -> bool:
  return weights.is_weights(c.weights)


def _tokenizer_path(c: TextConfig) -> pathlib.Path:
  return pathlib.Path(c.weights) / 'tokenizer.json'
