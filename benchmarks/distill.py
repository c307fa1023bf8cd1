"""Action error and video of runs at chosen numbers of video steps, over held-out events and seeds
of the noise: what a few-step student keeps of its teacher.

wallwm bench distill --store stores/mt10 runs/mt10_event runs/mt10_event@1 runs/mt10_student1
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import harness
import jax
import numpy as np

from wallwm_jax.commands.evaluators import Windows, observe
from wallwm_jax.data.store import EventStore
from wallwm_jax.evaluation import open_loop, video
from wallwm_jax.inference.event import predict_event
from wallwm_jax.models import functional
from wallwm_jax.training.checkpoints import load_inference
from wallwm_jax.types import ConfigError


def make_predictor(config):
  """(params, obs, text, key, length, bucket) -> physical actions [B, K, A] and the frames
  [B, V, T, H, W, 3] in 0..1 that the clean estimate at the anchor decodes to."""

  @functools.partial(jax.jit, static_argnames='bucket')
  def predict(params, obs, text, key, length, bucket):
    out = predict_event(params, obs, text, key, cfg=config, bucket=bucket, length=length)
    frames = functional.decode_video(config.model, out.latents, params.frozen.codec)
    return out.chunk.actions, frames

  return predict


def score(config, params, batches, seed: int, predict) -> tuple[float, float]:
  """(action MAE, PSNR in dB of the future frames of the anchor's clean estimate), means over
  events."""
  maes, decibels = [], []
  rate, norm = config.model.steps_per_latent, params.norm
  for batch in batches:
    own = len(batch.num_frames)
    rows = np.minimum(np.arange(config.data.batch_size), own - 1)
    whole = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], batch)
    length = np.maximum((whole.num_frames - 1) // rate, 1).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(seed), int(batch.uid[0, 0]))
    actions, frames = predict(
      params, observe(config, norm, whole), whole.text, key, length,
      bucket=batch.actions.shape[1] // rate)
    true = open_loop.denormalise(batch.actions, norm.action_mean, norm.action_scale)
    errors = open_loop.action_errors(
      np.asarray(actions)[:own], true, np.asarray(batch.action_mask), config.model.action_spec)
    maes += errors.mae.tolist()
    shown = np.asarray(batch.frames, np.float32) / 255
    pixels = np.broadcast_to(np.asarray(batch.pixel_mask)[:, :, None], shown.shape[:-1])
    each = np.asarray(video.psnr(np.asarray(frames)[:own], shown, pixels))  # [B, V, T]
    time = np.arange(shown.shape[2])
    future = (time > 0) & (time < np.asarray(batch.num_frames)[:, None])
    seen = np.asarray(batch.view_mask)[..., None] & future[:, None]
    decibels += [each[i][seen[i]].mean() for i in range(own)]
  return float(np.nanmean(maes)), float(np.mean(decibels))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('runs', nargs='+', help='WORKDIR, or WORKDIR@STEPS for other video steps')
  parser.add_argument('--store', required=True)
  parser.add_argument('--limit', type=int, help='at most this many held-out events (all)')
  parser.add_argument('--seeds', type=int, default=3, help='seeds of the noise (3)')
  parser.add_argument(
    '--bucket', type=int, help='one window for all events, this many future latents long; it '
    'compiles once')
  args = parser.parse_args()
  store = EventStore(args.store)
  for run in args.runs:
    workdir, _, steps = run.partition('@')
    config, params = load_inference(workdir)
    if config.data.window != 'event':
      raise ConfigError(f'{workdir}: expected a run on event windows, got {config.data.window!r}.')
    if steps:
      inference = dataclasses.replace(config.inference, video_steps=int(steps))
      config = dataclasses.replace(config, inference=inference)
    if args.bucket:
      data = dataclasses.replace(config.data, buckets=(args.bucket,))
      config = dataclasses.replace(config, data=data)
    batches = list(Windows(config, store, params.norm, 'heldout', args.limit).batches())
    predict = make_predictor(config)
    scores = np.array([score(config, params, batches, s, predict) for s in range(args.seeds)])
    mae, psnr = scores.T
    harness.report(
      f'action MAE of {run} at {config.inference.video_steps} video steps',
      'm, rad or gripper units',
      sum(len(batch.num_frames) for batch in batches),
      mae=mae.mean(),
      mae_by_seed=mae.tolist(),
      psnr_db=psnr.mean(),
      psnr_by_seed=psnr.tolist(),
    )


if __name__ == '__main__':
  main()
