import json

import pytest
import yaml
from lerobot_factory import CAMERAS, SPEC, make_raw, smooth_episode, write_v21, write_v30

from wallwm_jax import cli
from wallwm_jax.data.readers.probe import probe, raw_format
from wallwm_jax.data.readers.spec import dump_spec, from_plain
from wallwm_jax.data.writers.lerobot import write_lerobot
from wallwm_jax.errors import DataError


@pytest.mark.parametrize('write, version', [(write_v21, 'v2.1'), (write_v30, 'v3.0')])
def test_a_layout_that_needs_a_spec(tmp_path, write, version):
  write(tmp_path, [make_raw(0, 7), make_raw(1, 5)])
  found = probe(tmp_path)
  assert (found['format'], found['version'], found['episodes']) == ('lerobot', version, 2)
  assert (found['frames'], found['fps'], found['language']) == (12, 10.0, ['task_index'])
  assert found['cameras'] == {
    c: {'size': [32, 48], 'codec': 'h264', 'pix_fmt': 'yuv420p', 'fps': 10.0} for c in CAMERAS
  }
  assert found['state']['observation.state']['names'][-1] == 'grip'
  assert found['action'] == {'action': {'dtype': 'float32', 'shape': [7], 'names': []}}
  assert found['spec'] is None and any('convention' in line for line in found['missing'])
  assert 'convention: TODO' in found['example_spec'] and found['problems'] == []
  json.dumps(found)


def test_what_our_writer_writes_needs_none(tmp_path):
  records = [smooth_episode(i) for i in range(2)]
  write_lerobot(records, tmp_path / 'out')
  found = probe(tmp_path / 'out')
  assert found['missing'] == [] and found['example_spec'] is None
  assert from_plain(found['spec']).arms[0].action.convention == 'absolute'
  assert found['stats']['per_episode'] and found['stats']['files'] == ['meta/stats.json']
  highest = max(r.actions[:, 0].max() for r in records)
  assert found['stats']['ranges']['action']['max'][0] == pytest.approx(highest)
  assert 'subtask_index' in found['language']


def test_problems_are_listed(tmp_path):
  write_v21(tmp_path, [make_raw(i, 5) for i in range(2)])
  (tmp_path / f'videos/chunk-000/{CAMERAS[0]}/episode_000000.mp4').write_bytes(b'no video')
  episodes = tmp_path / 'meta/episodes.jsonl'
  episodes.write_text(episodes.read_text().splitlines()[0])
  first, second = probe(tmp_path)['problems']
  assert 'meta/episodes has no 1' in first and 'cannot be opened' in second


def test_folders_that_are_nothing(tmp_path):
  assert raw_format(tmp_path) is None
  with pytest.raises(DataError, match='found none of them'):
    probe(tmp_path)


def test_real_samples(shared_data):
  v30 = probe(shared_data / 'lerobot_v30_metaworld')
  assert (v30['episodes'], v30['frames'], v30['fps']) == (4, 262, 20.0)
  assert {c['codec'] for c in v30['cameras'].values()} == {'av1'} and len(v30['cameras']) == 3
  assert v30['other']['phase']['dtype'] == 'int64' and v30['missing'] == []
  v21 = probe(shared_data / 'lerobot_v21_metaworld')
  assert v21['stats']['ranges']['action']['max'][1] == 1.0 and v21['stats']['per_episode']
  bridge = probe(shared_data / 'bridge_rlds')
  assert (bridge['format'], bridge['version']) == ('rlds', '1.0.0')
  assert bridge['episodes'] == {'train': 25} and bridge['fps'] == 5.0
  assert 'language_instruction' in bridge['language'] and bridge['missing'] == []
  droid = probe(shared_data / 'droid_three_view')
  assert (droid['format'], droid['episodes'], droid['frames']) == ('video', 1, 419)
  assert all(c['size'] == [180, 320] for c in droid['cameras'].values())


def test_the_command_line(tmp_path, capsys):
  """inspect shows raw data; a spec written to a file builds a store; inspect shows the store."""
  raw, spec, out = tmp_path / 'raw', tmp_path / 'spec.yaml', tmp_path / 'store'
  write_v30(raw, [make_raw(i) for i in range(3)])
  assert cli.main(['data', 'inspect', str(raw)]) == 0
  assert yaml.safe_load(capsys.readouterr().out)['format'] == 'lerobot'
  build = ['data', 'build', '--reader', 'lerobot', '--source', str(raw), '--out', str(out)]
  assert cli.main(build) != 0
  assert 'convention: TODO' in capsys.readouterr().err
  spec.write_text(dump_spec(SPEC))
  assert cli.main([*build, '--spec', str(spec)]) == 0
  report = json.loads(capsys.readouterr().out)
  assert (report['episodes'], report['quarantined']) == (3, 0)
  assert cli.main(['data', 'inspect', str(out)]) == 0
  assert 'event store' in capsys.readouterr().out
