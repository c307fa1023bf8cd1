"""Shapes of batches whose rows hold several events."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from wallwm_jax.config.model import ModelConfig
from wallwm_jax.types import Cameras, PackedBatch, Prompt, Text


def most_events(budget: int) -> int:
  """G of rows of `budget` latent frames: the shortest events cost an anchor and one more."""
  return budget // 2


def spec(
  model: ModelConfig, budget: int, b: int, *, picture: tuple[int, ...], prompt_tokens: int
) -> PackedBatch:
  """The PackedBatch of ShapeDtypeStructs of `b` rows of `budget` latent frames.

  Args:
    picture: shape of a frame, () = rows hold latents, not frames; prompt_tokens: of an event's
      prompt, 0 = none.
  """
  s = jax.ShapeDtypeStruct
  f32, i32, flag = (np.dtype(name) for name in ('float32', 'int32', 'bool'))
  g, f = most_events(budget), budget
  frames, steps = row_frames(f, model.steps_per_latent)
  v, (height, width) = len(model.views), model.image_size
  a, x, e = model.action_spec.dim, model.text.tokens, model.text.width
  h, w, c = *model.latent_size, model.codec.channels
  prompt = None
  if prompt_tokens:
    prompt = Prompt(s((b, g, prompt_tokens), i32), s((b, g, prompt_tokens), flag))
  return PackedBatch(
    frames=s((b, v, frames, *picture), np.dtype('uint8')) if picture else None,
    frame_segment=s((b, frames), i32) if picture else None,
    latents=s((b, v, f, h, w, c), f32) if not picture else None,
    segment=s((b, f), i32),
    position=s((b, f), i32),
    anchor=s((b, f), flag),
    actions=s((b, steps, a), f32),
    action_mask=s((b, steps, a), flag),
    step_segment=s((b, steps), i32),
    step_position=s((b, steps), i32),
    event_mask=s((b, g), flag),
    num_latents=s((b, g), i32),
    raw_length=s((b, g), i32),
    state=s((b, g, a), f32),
    text=Text(features=s((b, g, x, e), f32), mask=s((b, g, x), flag)),
    view_mask=s((b, g, v), flag),
    pixel_mask=s((b, g, v, height, width), flag),
    cameras=Cameras(s((b, g, v, 3, 3), f32), s((b, g, v, 4, 4), f32), s((b, g, v), flag)),
    uid=s((b, g, 2), np.dtype('uint32')),
    prompt=prompt,
  )


def row_frames(budget: int, rate: int) -> tuple[int, int]:
  """(T raw frames, K action steps) that a row of `budget` latent frames has room for: those of one
  event that fills it; more events need less of both."""
  return 1 + rate * (budget - 1), rate * (budget - 1)


def layout(latents: list[int], budget: int, rate: int) -> dict[str, np.ndarray]:
  """Which event every place of one row belongs to.

  Args:
    latents: future latent frames n of its events, in order; rate: action steps per latent.

  Returns:
    The fields segment, position, anchor [F], frame_segment [T], step_segment and step_position [K]
    of a PackedBatch, without a batch axis.
  """
  frames, steps = row_frames(budget, rate)
  numbers, n = np.arange(1, len(latents) + 1, dtype=np.int32), np.asarray(latents)

  def segments(counts, size):
    return np.pad(np.repeat(numbers, counts), (0, size - counts.sum()))

  def positions(counts, size):
    starts = np.cumsum(counts) - counts
    inside = np.arange(counts.sum()) - np.repeat(starts, counts)
    return np.pad(inside, (0, size - len(inside))).astype(np.int32)

  segment, position = segments(1 + n, budget), positions(1 + n, budget)
  return {
    'segment': segment,
    'position': position,
    'anchor': (segment > 0) & (position == 0),
    'frame_segment': segments(1 + rate * n, frames),
    'step_segment': segments(rate * n, steps),
    'step_position': positions(rate * n, steps),
  }


def lay_out(batch: PackedBatch, future: int, rate: int) -> PackedBatch:
  """A batch of random numbers as one whose rows hold as many events of `future` latents as fit."""
  b, budget = batch.segment.shape
  count = budget // (1 + future)
  fields = layout([future] * count, budget, rate)
  if batch.frames is None:
    fields['frame_segment'] = None
  fields = {k: x if x is None else np.tile(x, (b, 1)) for k, x in fields.items()}
  real = np.broadcast_to(np.arange(batch.event_mask.shape[1]) < count, batch.event_mask.shape)
  return dataclasses.replace(
    batch,
    **fields,
    event_mask=real,
    num_latents=np.where(real, future, 0).astype(np.int32),
    raw_length=np.where(real, 1 + rate * future, 0).astype(np.int32),
    action_mask=batch.action_mask & (fields['step_segment'] > 0)[..., None],
  )
