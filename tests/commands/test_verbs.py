"""The verbs on a tiny run: train, evaluate, export, through the command line."""

import json

import numpy as np
import pytest

from wallwm_jax import cli
from wallwm_jax.commands import rollout, serve


@pytest.mark.slow
def test_train_evaluate_and_export_a_tiny_run(experiment, store, tmp_path, capsys):
  workdir, scores, policy = tmp_path / 'run', tmp_path / 'scores.json', tmp_path / 'policy'

  def run(*argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out

  run('data', 'verify', store.path)
  assert 'synthetic' in run('data', 'inspect', store.path)
  override = f'--config.data.store={store.path}'
  assert 'action' in run('train', '--config', experiment, '--dry-run', override)
  trained = json.loads(
    run('train', '--config', experiment, '--workdir', workdir, '--quiet', override)
  )
  assert trained['step'] == 2 and np.isfinite(trained['loss'])

  page = tmp_path / 'page.html'
  run(
    'eval', 'openloop', '--workdir', workdir, '--store', store.path, '--json', scores,
    '--action-steps', '1', '--html', page,
  )  # fmt: skip
  found = json.loads(scores.read_text())
  assert list(found['by_action_steps']) == ['1'] and page.read_text().count('<img ') == 2 + 4
  assert {'action_mae', 'action_mae_hold', 'action_mae_mean', 'n'} <= set(found)
  assert found['environment']['jax'] and found['n'] == 8
  assert len(found['rows']) == 8 and found['duration_n'] == 8 and found['image_shuffle_n'] == 8
  assert found['suite']['window'] == 'event' and found['suite']['buckets'] == [2, 4]
  same = json.loads(run('eval', 'compare', scores, scores))['metrics']
  assert same['action_mae']['difference'] == 0 and same['action_mae']['n'] == 8

  run(
    'eval', 'video', '--workdir', workdir, '--store', store.path, '--json', scores, '--limit', '2',
    '--html', page,
  )  # fmt: skip
  found = json.loads(scores.read_text())
  assert 'Geometry' not in page.read_text() and found['gripper_px'] == {}  # no calibration
  assert {'psnr_model', 'psnr_copy_last', 'psnr_codec', 'ssim_model', 'psnr_end_model'} <= set(
    found
  )

  run(
    'eval', 'latency', '--workdir', workdir, '--calls', '2', '--cold', '--json', scores,
    '--html', page,
  )  # fmt: skip
  found = json.loads(scores.read_text())
  assert len(found['rows']) == 2 and found['peak_memory_mib'] > 0
  assert set(found['deadline_misses']['whole prediction']) == {'10', '20', '30'}
  cold = found['cold_start']['empty cache']
  parts = cold['import_s'] + cold['load_s'] + cold['first_chunk_s']
  assert cold['total_s'] == pytest.approx(parts) and cold['first_chunk_s'] > 0
  assert 'warm cache' in page.read_text()

  captions = tmp_path / 'captions.txt'
  captions.write_text('go there\n\ncome back\ngo there\n')
  planned = json.loads(run('export', workdir, '--out', policy, '--dry-run', '--text', captions))
  assert not policy.exists() and planned['captions'] == 2
  made = json.loads(run('export', workdir, '--out', policy, '--buckets', '2', '--text', captions))
  assert [p['batch'] for p in made['programs']] == [None, None] and made['captions'] == 2
  served = serve.make_policy(cli.make_parser().parse_args(['serve', '--artifact', str(policy)]))
  image = np.zeros((16, 16, 3), np.uint8)
  views = {'observation/front': image, 'observation/side': image}
  work = served.check(
    views | {'observation/state': np.eye(10)[3] + np.eye(10)[7], 'event': 'go there'},
    served.start(),
  )
  assert served.infer([work])[0]['actions'].shape == (8, 10)


def test_an_export_needs_what_it_is_asked_for(experiment, tmp_path, capsys):
  empty = tmp_path / 'empty.txt'
  empty.write_text('\n')
  config = ['export', '--config', str(experiment), '--out', str(tmp_path / 'policy')]
  for more, message in (
    ([], '--programs-only'),
    (['--programs-only', '--platforms', 'gpu'], 'platforms: expected some of'),
    (['--programs-only', '--buckets', '9'], 'event bucket: expected 1..4'),
    (['--programs-only', '--text', str(empty)], 'expected captions, one a line'),
  ):
    assert cli.main([*config, *more]) == 1 and message in capsys.readouterr().err
  assert not (tmp_path / 'policy').exists()
  with pytest.raises(SystemExit):
    cli.main([*config, '--batch', '0'])


def test_data_stats_are_written_and_read_back(experiment, store, tmp_path, capsys):
  from wallwm_jax.data import stats

  out = tmp_path / 'stats.json'
  assert (
    cli.main(['data', 'stats', str(store.path), '--config', str(experiment), '--out', str(out)])
    == 0
  )
  printed = json.loads(capsys.readouterr().out)
  assert printed['hash'] == stats.stats_hash(stats.load(out))


@pytest.mark.parametrize('suffix', ['.mp4', '.gif'])
def test_recordings_can_be_played(tmp_path, suffix):
  frames = np.zeros((5, 34, 65, 3), np.uint8)
  frames[np.arange(5), :, :] = 50 * np.arange(5)[:, None, None, None]
  path = tmp_path / f'film{suffix}'
  rollout.WRITERS[suffix](path, frames, 10.0)
  import av

  with av.open(str(path)) as film:
    shades = [float(f.to_ndarray(format='rgb24').mean()) for f in film.decode(video=0)]
  assert len(shades) == 5
  np.testing.assert_allclose(shades, 50 * np.arange(5), atol=4)
