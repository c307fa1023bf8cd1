"""Video sampling as users of Wan know it: text (and first frames) to video, guided by a caption.

  caption, negative caption, given latents -> solver over the video tower -> latents of every view

Unlike the denoiser of the policy, nothing here stops at the anchor level and no action is made.
Source of the procedure: Wan (arXiv 2503.20314) and the public inference code of Wan2.2 TI2V.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from wallwm_jax.config import ExperimentConfig
from wallwm_jax.diffusion import flow, samplers, schedules
from wallwm_jax.diffusion.samplers import Solver
from wallwm_jax.diffusion.schedules import Grid
from wallwm_jax.models import functional
from wallwm_jax.types import DataError, InferenceParams, PRNGKey, Text

# The grid a solver is published with: UniPC with Wan's own, Euler with this project's training one.
GRIDS: dict[Solver, Grid] = {'unipc': 'wan', 'euler': 'uniform'}
# Both captions go through the tower in one forward while its widest activations stay below this.
# Larger videos fill an accelerator by themselves: one forward of twice the size would only cost
# memory.
TOGETHER_BYTES = 2**30


def known_latents(
  params: InferenceParams, frames: UInt8[Array, 'B V T H W 3'], *, cfg: ExperimentConfig
) -> Float[Array, 'B V M h w C']:
  """Normalised latents of the given first frames, T = 1 + 4(M - 1)."""
  latents = functional.encode_video(cfg.model, frames, params.frozen.codec)
  return functional.normalise_latents(latents, params.norm)


def generate_video(
  params: InferenceParams,
  text: Text,
  null_text: Text | None = None,
  known: Float[Array, 'B V M h w C'] | None = None,
  noise: Float[Array, 'B V F h w C'] | None = None,
  *,
  cfg: ExperimentConfig,
  solver: Solver = 'unipc',
  steps: int = 50,
  shift: float = 5.0,
  guidance: float = 5.0,
  grid: Grid | None = None,
  key: PRNGKey | None = None,
  frames: int | None = None,
  view_mask: Bool[Array, 'B V'] | None = None,
  together: bool | None = None,
  on_step: Callable[[float], None] | None = None,
) -> Float[Array, 'B V F h w C']:
  """Latents of every view, denoised from pure noise to level 0 in `steps` calls of the tower.

  Args:
    text: features of the captions. null_text: of the caption that guidance moves away from, [1, X,
      E] or [B, X, E]; None takes the one of `params.frozen`, or attends to no text at all.
    known: normalised latents of the first M frames (`known_latents`), in place at level 0 before
      every call and again in the result; None is text-to-video.
    noise: unit Gaussian; None draws it from `key` for `frames` latent frames.
    guidance: g of v_null + g (v_text - v_null); 1 saves the second forward.
    grid: noise levels, see `schedules.solver_sigmas`; None is the solver's own of `GRIDS`.
    view_mask: False where a camera is absent; None = all are there.
    together: both captions in one forward; None decides by memory (`fits_together`).
    on_step: called on the host with the noise level of each step as it begins.

  Returns:
    Float32 latents in codec units, ready for `functional.decode_video`. Pure: equal arguments give
    equal latents.

  Raises:
    ConfigError: unknown solver or grid, steps or shift out of range.
    DataError: latents, noise, text or masks of shapes that do not go together.
  """
  if noise is None:
    noise = _draw(key, frames, cfg, text.mask.shape[0])
  if known is None:
    known = noise[:, :, :0]
  if view_mask is None:
    view_mask = jnp.ones(noise.shape[:2], bool)
  _check(cfg, text, null_text, known, noise, view_mask)
  call = _network(params, text, null_text, known, view_mask, guidance, together, cfg)

  def velocity(z, sigma, level):
    if on_step is not None:
      jax.debug.callback(on_step, sigma)
    return call(z, sigma, level)

  schedule = schedules.solver_sigmas(grid or GRIDS.get(solver, 'uniform'), steps, shift)
  z = samplers.integrate(velocity, noise.astype(jnp.float32), schedule, solver)
  return functional.denormalise_latents(_in_place(known, z), params.norm)


def fits_together(cfg: ExperimentConfig, shape: tuple[int, ...]) -> bool:
  """Whether one forward of both captions over noise of `shape` [B, V, F, h, w, C] stays small.

  Counts what is alive at once in a block: the FFN's hidden layer and eight arrays of model width.
  """
  video = cfg.model.video
  tokens = 2 * int(np.prod(shape[:3])) * cfg.model.patches
  size = jnp.dtype(cfg.model.dtype).itemsize
  return tokens * (video.ffn + 8 * video.width) * size <= TOGETHER_BYTES


def _network(params, text, null_text, known, view_mask, guidance, together, cfg) -> Callable:
  """(z, sigma, level) -> guided velocity."""

  def run(z, sigma, level, text, known, view_mask):
    return _velocity(params, text, known, view_mask, z, sigma, level, cfg)

  def guided(z, sigma, level):
    if guidance == 1.0:
      return run(z, sigma, level, text, known, view_mask)
    if fits_together(cfg, z.shape) if together is None else together:
      both = jax.tree.map(twice, (empty, known, view_mask), (text, known, view_mask))
      dropped, v = jnp.split(run(twice(z, z), sigma, level, *both), 2)
    else:
      dropped = run(z, sigma, level, empty, known, view_mask)
      v = run(z, sigma, level, text, known, view_mask)
    return dropped + guidance * (v - dropped)

  def twice(a, b):
    return jnp.concatenate([a, b])

  given = params.frozen.null_text if null_text is None else null_text
  empty = functional.empty_text(text, given)
  return guided


def _velocity(params, text, known, view_mask, z, sigma, level, cfg: ExperimentConfig):
  """Velocity of z at level sigma by the video tower, which is told `level`."""
  batch, frames = z.shape[0], z.shape[2]
  is_known = np.arange(frames) < known.shape[2]
  masks = functional.video_masks(view_mask, jnp.ones((batch, frames), bool))
  inputs, t = functional.condition_video(
    cfg.model, z, jnp.full((batch,), level), _in_place(known, z), is_known
  )
  out, _ = functional.video_forward(params.model['video'], cfg.model, inputs, t, text, masks)
  return flow.to_velocity(out, z, jnp.full((batch,), sigma), cfg.model.video.prediction)


def _in_place(known, z):
  """`z` with its first frames replaced by the known ones."""
  return jnp.concatenate([known.astype(z.dtype), z[:, :, known.shape[2] :]], axis=2)


def _draw(key, frames, cfg: ExperimentConfig, batch: int):
  if key is None or frames is None:
    raise DataError(
      'generate_video: expected noise, or a key and the number of latent frames to draw it, got '
      f'noise=None, key={"given" if key is not None else None}, frames={frames}.'
    )
  model = cfg.model
  shape = (batch, len(model.views), frames, *model.latent_size, model.codec.channels)
  return jax.random.normal(key, shape)


def _check(cfg: ExperimentConfig, text, null_text, known, noise, view_mask) -> None:
  """Raises DataError unless all shapes go together. Static, so free under jit."""
  model, batch = cfg.model, text.mask.shape[0]
  frames = noise.shape[2] if noise.ndim == 6 else 1
  views, cells = len(model.views), (*model.latent_size, model.codec.channels)
  words = (model.text.tokens, model.text.width)
  expected = {
    'noise': (noise, (batch, views, frames, *cells)),
    'known': (known, (batch, views, known.shape[2] if known.ndim == 6 else 1, *cells)),
    'view_mask': (view_mask, (batch, views)),
    'text.features': (text.features, (batch, *words)),
  }
  if null_text is not None:
    rows = null_text.features.shape[0]
    expected['null_text.features'] = (null_text.features, (batch if rows != 1 else 1, *words))
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise DataError(
        f'generate_video: {name}: expected shape {shape} (views {model.views}, image_size '
        f'{model.image_size}), got {tuple(array.shape)}.'
      )
  if known.shape[2] > frames:
    raise DataError(
      f'generate_video: known: expected at most the {frames} latent frames of the noise, got '
      f'{known.shape[2]}.'
    )
