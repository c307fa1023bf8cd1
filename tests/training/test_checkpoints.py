"""What is saved comes back, what does not belong is refused, and nothing saved is ever lost."""

import dataclasses
import errno
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from wallwm_jax.config import MeshConfig, OptimConfig, VideoConfig
from wallwm_jax.parallel.mesh import make_mesh
from wallwm_jax.training import checkpoints
from wallwm_jax.training.checkpoints import Checkpoints, load_inference, load_params_for_init
from wallwm_jax.training.state import abstract_state, build_optimizer, param_shapes
from wallwm_jax.types import CheckpointError

DATA = {'position': {'next': 12}, 'plan': {'seed': 3}}


def abstract_of(config):
  mesh = make_mesh(config.mesh)
  return abstract_state(config, build_optimizer(config, mesh), mesh)


def filled(abstract, step: int):
  """A state whose every leaf holds its own number, so that swapped leaves show."""
  leaves, treedef = jax.tree.flatten(abstract)
  values = [
    jax.device_put(np.full(s.shape, i + step).astype(s.dtype), s.sharding)
    for i, s in enumerate(leaves)
  ]
  state = jax.tree.unflatten(treedef, values)
  return dataclasses.replace(state, step=jax.device_put(np.int32(step), abstract.step.sharding))


def save(config, workdir, *steps):
  with Checkpoints(workdir, config.train.keep) as saved:
    for step in steps:
      saved.save(filled(abstract_of(config), step), DATA, norm_of(config, step), config)


def norm_of(config, seed: int):
  rng = np.random.default_rng(seed)
  a, c = config.model.action_spec.dim, config.model.codec.channels
  sizes = {'action': a, 'state': a, 'latent': c}
  return checkpoints.NormStats(
    **{
      f'{name}_{part}': rng.random(n, np.float32)
      for name, n in sizes.items()
      for part in ('mean', 'scale')
    }
  )


def test_everything_comes_back_on_another_mesh(tiny, tmp_path):
  config = tiny.config('joint')
  save(config, tmp_path, 7)
  other = dataclasses.replace(config, mesh=MeshConfig(fsdp=4, tensor=2))
  abstract = abstract_of(other)
  with Checkpoints(tmp_path, 2) as saved:
    snapshot = saved.restore(abstract)
  jax.tree.map(np.testing.assert_array_equal, snapshot.state, filled(abstract_of(config), 7))
  assert jax.tree.all(
    jax.tree.map(
      lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), snapshot.state, abstract
    )
  )
  assert snapshot.data == DATA and snapshot.config == config
  jax.tree.map(np.testing.assert_array_equal, snapshot.norm, norm_of(config, 7))


def test_only_the_newest_are_kept(tiny, tmp_path):
  config = tiny.config('2', train={'keep': 2})
  save(config, tmp_path, 1, 2, 3)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '3']


def test_checkpoint_of_another_model_names_the_differing_paths(tiny, tmp_path):
  config = tiny.config('1')
  save(config, tmp_path, 1)
  video = VideoConfig(width=32, layers=2, heads=2, ffn=64, freq_dim=32)
  wider = dataclasses.replace(config, model=dataclasses.replace(config.model, video=video))
  with (
    Checkpoints(tmp_path, 2) as saved,
    pytest.raises(
      CheckpointError,
      match=r'video/blocks/ffn/up/kernel: expected \[\[2, 32, 64\].*'
      r'got \[\[2, 32, 32\]',
    ),
  ):
    saved.restore(abstract_of(wider))


def test_checkpoint_of_another_optimizer_is_refused(tiny, tmp_path):
  config = tiny.config('1')
  save(config, tmp_path, 1)
  adamw = dataclasses.replace(config, optim=OptimConfig(optimizer='adamw'))
  with Checkpoints(tmp_path, 2) as saved, pytest.raises(CheckpointError, match='opt_state.*absent'):
    saved.restore(abstract_of(adamw))


def no_space(*_, **__):
  raise OSError(errno.ENOSPC, 'No space left on device')


def real_limit(monkeypatch):
  """From here on no file may grow beyond 64 KiB: writes fail inside the storage library."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
  return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def raising(monkeypatch):
  monkeypatch.setattr(ocp.CheckpointManager, 'save', no_space)
  return monkeypatch.undo


@pytest.mark.parametrize('fill_disk', [raising, real_limit])
def test_full_disk_is_an_error_and_loses_nothing(tiny, tmp_path, monkeypatch, fill_disk):
  config = tiny.config('2', train={'keep': 2})
  save(config, tmp_path, 1, 2)
  abstract = abstract_of(config)
  state, norm = filled(abstract, 3), norm_of(config, 3)
  with Checkpoints(tmp_path, 2) as saved:
    free_disk = fill_disk(monkeypatch)
    try:
      with pytest.raises(CheckpointError, match=r'checkpoints/3 could not be written.*\[1, 2\]'):
        saved.save(state, DATA, norm, config)
    finally:
      free_disk()
  with Checkpoints(tmp_path, 2) as saved:
    assert saved.latest_step() == 2
    for step in (1, 2):
      jax.tree.map(
        np.testing.assert_array_equal, saved.restore(abstract, step).state, filled(abstract, step)
      )
    saved.save(state, DATA, norm, config)  # and the run goes on once there is space
    assert saved.latest_step() == 3


def test_interrupted_checkpoints_are_ignored(tiny, tmp_path):
  config = tiny.config('2')
  save(config, tmp_path, 4)
  partial = tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp'
  (partial / 'params').mkdir(parents=True)
  config_back, _ = load_inference(tmp_path)
  assert config_back == config and partial.exists()  # a reader cleans nothing up: it may be live
  with Checkpoints(tmp_path, 2) as saved:
    assert saved.latest_step() == 4
  assert not partial.exists()


def test_unreadable_bytes_are_a_clear_error(tiny, tmp_path):
  config = tiny.config('2')
  save(config, tmp_path, 4)
  for file in (tmp_path / 'checkpoints' / '4' / 'ema').rglob('*'):
    if file.is_file() and file.parent.name == 'd':
      file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(CheckpointError, match='checkpoints/4 cannot be read'):
    load_inference(tmp_path)


def test_inference_gets_averages_of_the_trained_tower_and_weights_of_the_frozen_one(tiny, tmp_path):
  config = tiny.config('2')
  save(config, tmp_path, 4)
  state = filled(abstract_of(config), 4)
  got_config, params = load_inference(tmp_path)
  assert got_config == config
  expected = {'video': state.params['video'], 'action': state.ema['action']}
  jax.tree.map(np.testing.assert_array_equal, params.model, expected)
  jax.tree.map(np.testing.assert_array_equal, params.norm, norm_of(config, 4))


def test_inference_can_read_an_older_step(tiny, tmp_path):
  config = tiny.config('2')
  save(config, tmp_path, 4, 5)
  older = load_inference(tmp_path, 4)[1].model['action']
  jax.tree.map(np.testing.assert_array_equal, older, filled(abstract_of(config), 4).ema['action'])
  with pytest.raises(CheckpointError, match=r'expected step 9, found steps \[4, 5\]'):
    load_inference(tmp_path, 9)


def test_a_directory_without_checkpoints_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match='expected a complete checkpoint, found steps'):
    load_inference(tmp_path)
  assert not list(tmp_path.iterdir())


def test_another_format_is_refused(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints, 'FORMAT', 99)
  save(tiny.config('2'), tmp_path, 1)
  monkeypatch.undo()
  with pytest.raises(CheckpointError, match='expected format 1, got 99'):
    load_inference(tmp_path)


def test_init_takes_shared_subtrees_onto_the_new_mesh(tiny, tmp_path):
  source = tiny.config('1')
  save(source, tmp_path, 4)
  target = abstract_of(dataclasses.replace(tiny.config('2'), mesh=MeshConfig(fsdp=8))).params
  target['critic'] = {'kernel': jax.ShapeDtypeStruct((3,), jnp.float32)}  # unknown to the source
  for path in (tmp_path, tmp_path / 'checkpoints' / '4'):
    got = load_params_for_init(path, target)
    assert got.keys() == {'video', 'action'}
    state = filled(abstract_of(source), 4)
    jax.tree.map(np.testing.assert_array_equal, got['video'], state.ema['video'])
    jax.tree.map(np.testing.assert_array_equal, got['action'], state.params['action'])
    kernel = got['video']['blocks']['ffn']['up']['kernel']
    assert len(kernel.sharding.device_set) == 8


def test_init_refuses_a_subtree_of_another_shape(tiny, tmp_path):
  config = tiny.config('1')
  save(config, tmp_path, 4)
  target = param_shapes(config)
  target['video']['head']['bias'] = jax.ShapeDtypeStruct((5,), jnp.float32)
  with pytest.raises(CheckpointError, match=r'video/head/bias: expected \[\[5\]'):
    load_params_for_init(tmp_path, target)


def test_metadata_holds_fingerprint_and_process_count(tiny, tmp_path):
  config = tiny.config('2')
  save(config, tmp_path, 1)
  file = tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata'
  meta = json.loads(file.read_text())
  assert meta['processes'] == 1
  assert meta['fingerprint'] == checkpoints.fingerprint(param_shapes(config))
  other = dataclasses.replace(config.model, max_future=3)
  assert meta['fingerprint'] != checkpoints.fingerprint(
    param_shapes(dataclasses.replace(config, model=other))
  )
