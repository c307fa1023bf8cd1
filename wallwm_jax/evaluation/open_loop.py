"""Open-loop action error per event, in physical units, beside what doing nothing clever would give.

Errors of one event are means over its supervised action steps; the numbers reported are means over
events. `action_mae` is the mean absolute difference over all supervised channels (position in m,
the six rotation-matrix entries and the gripper as they stand); the groups are reported in units of
their own: position m, rotation rad (geodesic angle), gripper 0..1. Shape is told apart from timing
by the distance along the best alignment of both paths (`alignment.dtw`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from wallwm_jax.config import ActionSpec
from wallwm_jax.evaluation import alignment
from wallwm_jax.evaluation.base import Interval, bootstrap_interval, skill
from wallwm_jax.geometry.poses import POSE_WIDTH, geodesic_angle, rot6d_to_matrix
from wallwm_jax.types import DataError, EventBatch, NormStats

PredictFn = Callable[
  [EventBatch], np.ndarray
]  # actions [B, K, A], physical, relative to the anchor pose


@dataclasses.dataclass(frozen=True)
class ActionErrors:
  """Errors of n events; every field [n], NaN where an event has nothing supervised in that group.

  mae: over all supervised channels; position: mean absolute error per axis m; rotation: mean
  geodesic angle rad; gripper: mean absolute error; endpoint, endpoint_rotation: position distance m
  and angle rad at the last supervised step; position_rmse m, rotation_rmse rad: root of the mean
  square of distances and angles over steps; dtw: m per aligned pair of positions; gripper_f1: of
  openings and closings, 1 is best, NaN also where there is none.
  """

  mae: np.ndarray
  position: np.ndarray
  rotation: np.ndarray
  gripper: np.ndarray
  endpoint: np.ndarray
  endpoint_rotation: np.ndarray
  position_rmse: np.ndarray
  rotation_rmse: np.ndarray
  dtw: np.ndarray
  gripper_f1: np.ndarray


@dataclasses.dataclass(frozen=True)
class OpenLoopResult:
  """Errors of the policy and of the baselines over the same n events.

  policy, hold, mean: {field of ActionErrors: mean over the events that have it}.
  interval: of the policy's mae, bootstrapped over episodes. skill_hold, skill_mean: 1 - mae /
  baseline mae. by_label: {label: (policy mae, hold mae, events)}; macro_mae: mean over labels.
  rows: the policy's errors of each scored event, with 'episode' and, where known, 'uid' and
  'label'.
  """

  n: int
  policy: dict[str, float]
  hold: dict[str, float]
  mean: dict[str, float]
  interval: Interval
  skill_hold: float
  skill_mean: float
  by_label: dict[str, tuple[float, float, int]]
  macro_mae: float
  rows: tuple[dict, ...] = ()

  def to_json(self) -> dict:
    """Flat keys for scripts: action_mae, action_mae_hold, action_mae_mean, action_position, ...,
    n."""
    flat = {'n': self.n}
    for suffix, scores in (('', self.policy), ('_hold', self.hold), ('_mean', self.mean)):
      flat |= {f'action_{name}{suffix}': value for name, value in scores.items()}
    flat |= {'action_mae_low': self.interval.low, 'action_mae_high': self.interval.high}
    flat |= {'episodes': self.interval.n, 'action_mae_macro': self.macro_mae}
    flat |= {'skill_hold': self.skill_hold, 'skill_mean': self.skill_mean}
    rows = {
      k: {'action_mae': m, 'action_mae_hold': h, 'n': n} for k, (m, h, n) in self.by_label.items()
    }
    return flat | {'by_label': rows}


def action_errors(predicted, true, mask, spec: ActionSpec, state=None) -> ActionErrors:
  """Errors of each event.

  Args:
    predicted, true: [B, K, A] physical units, relative to the anchor pose.
    mask: [B, K, A], True where a channel is supervised.
    state: [B, A] absolute at the anchor, for the gripper before the first step; None = as the first
      true step says.

  Raises:
    DataError: shapes that differ, or an A that is not the spec's.
  """
  predicted, true, mask = np.asarray(predicted), np.asarray(true), np.asarray(mask, bool)
  if (
    not predicted.shape == true.shape == mask.shape or true.ndim != 3 or true.shape[-1] != spec.dim
  ):
    raise DataError(
      f'action_errors: expected three arrays [B, K, {spec.dim}], got predicted {predicted.shape}, '
      f'true {true.shape}, mask {mask.shape}.'
    )
  absolute = np.abs(predicted - true)
  arms = (*true.shape[:2], spec.arms, POSE_WIDTH)
  predicted, true, mask_arms = predicted.reshape(arms), true.reshape(arms), mask.reshape(arms)
  angle = geodesic_angle(rot6d_to_matrix(predicted[..., 3:9]), rot6d_to_matrix(true[..., 3:9]))
  difference = np.abs(predicted - true)
  distance = np.linalg.norm(predicted[..., :3] - true[..., :3], axis=-1)
  has_position, has_rotation = mask_arms[..., :3].all(-1), mask_arms[..., 3:9].all(-1)
  before = true[:, 0] if state is None else np.asarray(state).reshape(len(true), -1, POSE_WIDTH)
  return ActionErrors(
    mae=_masked_mean(absolute, mask),
    position=_masked_mean(difference[..., :3], mask_arms[..., :3]),
    rotation=_masked_mean(angle, has_rotation),
    gripper=_masked_mean(difference[..., 9], mask_arms[..., 9]),
    endpoint=_masked_mean(distance, _last_step(has_position)),
    endpoint_rotation=_masked_mean(angle, _last_step(has_rotation)),
    position_rmse=np.sqrt(_masked_mean(distance**2, has_position)),
    rotation_rmse=np.sqrt(_masked_mean(angle**2, has_rotation)),
    dtw=_path_distance(predicted[..., :3], true[..., :3], has_position),
    gripper_f1=alignment.gripper_f1(
      predicted[..., 9], true[..., 9], before[..., 9], mask_arms[..., 9]
    ),
  )


def _path_distance(predicted, true, valid) -> np.ndarray:
  """`alignment.dtw` [B] of the supervised steps of position paths [B, K, R, 3], mean over arms that
  have any; valid: [B, K, R]."""
  scores = []
  for arm in range(valid.shape[2]):
    keep = valid[:, :, arm]
    order = np.argsort(~keep, axis=1, kind='stable')[..., None]  # supervised steps first
    paths = [np.take_along_axis(x[:, :, arm], order, axis=1) for x in (predicted, true)]
    lengths = keep.sum(1)
    scores.append(alignment.dtw(*paths, lengths, lengths))
  scores = np.stack(scores, 1)
  return _masked_mean(scores, np.isfinite(scores))


def hold_actions(state, steps: int) -> np.ndarray:
  """The hold-still baseline: stay at the anchor pose, keep the gripper.

  Args:
    state: [B, A] physical, absolute. Returns: [B, steps, A] relative actions.
  """
  state = np.asarray(state)
  arms = state.reshape(len(state), -1, POSE_WIDTH)
  still = np.zeros_like(arms)
  still[..., 3:9] = (1, 0, 0, 0, 1, 0)  # identity rotation
  still[..., 9] = arms[..., 9]
  return np.repeat(still.reshape(len(state), 1, -1), steps, axis=1)


def mean_actions(events: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
  """The predict-the-mean baseline: the mean relative action at each step index of training events.

  Args:
    events: (actions [K, A] physical, mask [K, A]) of each event; K may differ.

  Returns:
    [K, A], K the longest event seen. A step that no event supervises repeats the one before.

  Raises:
    DataError: no events.
  """
  total = count = None
  for actions, mask in events:
    if total is None:
      total, count = np.zeros((0, actions.shape[1])), np.zeros((0, actions.shape[1]))
    total, count = _add(total, np.where(mask, actions, 0)), _add(count, mask)
  if total is None:
    raise DataError('mean_actions: expected at least one training event, got none.')
  mean = total / np.maximum(count, 1)
  for step in range(1, len(mean)):
    mean[step] = np.where(count[step] > 0, mean[step], mean[step - 1])
  return mean


def denormalise(x, mean, scale) -> np.ndarray:
  """Physical units of a normalised array [..., A], in float64."""
  return np.asarray(x, np.float64) * np.asarray(scale, np.float64) + np.asarray(mean, np.float64)


def evaluate(
  batches: Iterable[EventBatch],
  predict: PredictFn,
  *,
  norm: NormStats,
  spec: ActionSpec,
  mean_action: np.ndarray,
  episode_of: Callable[[EventBatch], Iterable] | None = None,
  label_of: Callable[[EventBatch], Iterable[str]] | None = None,
) -> OpenLoopResult:
  """Compares predicted with demonstrated actions over held-out windows.

  Args:
    batches: normalised windows; predict: answers each with physical actions [B, K, A].
    mean_action: [steps, A] from `mean_actions`; its last step holds on.
    episode_of, label_of: the episode id and the label of each of a batch's events; None = every
      event its own episode, no labels.

  Raises:
    DataError: no batches, or predictions of the wrong shape.
  """
  rows: list[tuple[ActionErrors, ActionErrors, ActionErrors]] = []
  episodes, labels, uids = [], [], []
  for batch in batches:
    true = denormalise(batch.actions, norm.action_mean, norm.action_scale)
    state = denormalise(batch.state, norm.state_mean, norm.state_scale)
    mask, steps = np.asarray(batch.action_mask), true.shape[1]
    guesses = (
      np.asarray(predict(batch), np.float64),
      hold_actions(state, steps),
      np.broadcast_to(mean_action[np.minimum(np.arange(steps), len(mean_action) - 1)], true.shape),
    )
    rows.append(tuple(action_errors(guess, true, mask, spec, state) for guess in guesses))
    start = len(episodes)
    episodes += list(episode_of(batch)) if episode_of else range(start, start + len(true))
    labels += list(label_of(batch)) if label_of else []
    words = np.asarray(batch.uid, np.uint64)
    uids += (words[:, 0] | words[:, 1] << np.uint64(32)).tolist()
  if not rows:
    raise DataError('open-loop evaluation: expected at least one held-out window, got none.')
  policy, hold, mean = (_concatenate([row[i] for row in rows]) for i in range(3))
  return summarise(policy, hold, mean, episodes, labels, uids)


def shuffled_images(batch: EventBatch) -> EventBatch:
  """The batch with the frames (and present cameras) of each window taken from the next one; state,
  text and actions stay.

  Raises:
    DataError: a batch of fewer than two windows.
  """
  if len(batch.num_frames) < 2:
    raise DataError('shuffled_images: expected at least two windows in a batch, got one or none.')
  frames, views = (np.roll(np.asarray(x), -1, 0) for x in (batch.frames, batch.view_mask))
  return dataclasses.replace(batch, frames=frames, view_mask=views)


def image_sensitivity(plain, shuffled, episodes) -> dict[str, float | int | None]:
  """How much worse actions get when a policy is shown the images of other events.

  Args:
    plain, shuffled: [n] mae of the same events; episodes: [n] ids for the bootstrap.

  Returns:
    image_shuffle_mae, image_shuffle_increase (mean of shuffled - plain, with _low and _high of
    95 %), image_shuffle_n. An increase near 0 means that the policy does not look.

  Raises:
    DataError: lengths that differ, or no event.
  """
  plain, shuffled = np.asarray(plain, np.float64), np.asarray(shuffled, np.float64)
  if plain.shape != shuffled.shape or plain.ndim != 1 or not len(plain):
    raise DataError(
      f'image_sensitivity: expected two arrays [n], n >= 1, got {plain.shape}, {shuffled.shape}.'
    )
  change = bootstrap_interval(shuffled - plain, episodes)
  return {
    'image_shuffle_mae': float(shuffled.mean()),
    'image_shuffle_increase': change.value,
    'image_shuffle_increase_low': change.low,
    'image_shuffle_increase_high': change.high,
    'image_shuffle_n': len(plain),
  }


def summarise(
  policy: ActionErrors, hold: ActionErrors, mean: ActionErrors, episodes, labels=(), uids=()
) -> OpenLoopResult:
  """OpenLoopResult of per-event errors; `episodes` [n] ids, `labels` [n] names and `uids` [n]
  of events or empty."""
  scored = np.isfinite(policy.mae)
  if not scored.any():
    raise DataError(
      'open-loop evaluation: no event has a supervised action (action_mask is all False).'
    )
  scores = [_means(errors, scored) for errors in (policy, hold, mean)]
  labels = np.asarray(labels)
  by_label = {}
  for label in sorted(set(labels.tolist())):
    chosen = scored & (labels == label)
    if chosen.any():
      by_label[label] = (*(float(e.mae[chosen].mean()) for e in (policy, hold)), int(chosen.sum()))
  macro = np.mean([row[0] for row in by_label.values()]) if by_label else scores[0]['mae']
  return OpenLoopResult(
    n=int(scored.sum()),
    policy=scores[0],
    hold=scores[1],
    mean=scores[2],
    interval=bootstrap_interval(policy.mae[scored], np.asarray(episodes)[scored]),
    skill_hold=skill(scores[0]['mae'], scores[1]['mae']),
    skill_mean=skill(scores[0]['mae'], scores[2]['mae']),
    by_label=by_label,
    macro_mae=float(macro),
    rows=_rows(policy, scored, {'uid': uids, 'episode': episodes, 'label': labels}),
  )


def _rows(errors: ActionErrors, scored, facts) -> tuple[dict, ...]:
  names = [f.name for f in dataclasses.fields(errors)]
  return tuple(
    {name: values[i] for name, values in facts.items() if len(values)}
    | {f'action_{name}': float(getattr(errors, name)[i]) for name in names}
    for i in np.flatnonzero(scored)
  )


def _masked_mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Mean over all axes but the first where the mask holds; NaN where it holds nowhere."""
  axes = tuple(range(1, values.ndim))
  count = mask.sum(axes)
  total = np.where(mask, values, 0).sum(axes)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _last_step(mask: np.ndarray) -> np.ndarray:
  """mask [B, K, arms] with only each event's and arm's last True step kept."""
  later = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
  return mask & (later == 1)


def _add(total: np.ndarray, part: np.ndarray) -> np.ndarray:
  """Sum of two [K, A] arrays whose K may differ: missing rows count as zero."""
  rows = max(len(total), len(part)) - np.array([len(total), len(part)])
  padded = [np.pad(x, ((0, more), (0, 0))) for x, more in zip((total, part), rows)]
  return padded[0] + padded[1]


def _concatenate(parts: list[ActionErrors]) -> ActionErrors:
  names = [f.name for f in dataclasses.fields(ActionErrors)]
  return ActionErrors(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def _means(errors: ActionErrors, scored: np.ndarray) -> dict[str, float]:
  means = {}
  for field in dataclasses.fields(errors):
    values = getattr(errors, field.name)[scored]
    means[field.name] = float(np.nanmean(values)) if np.isfinite(values).any() else float('nan')
  return means
