"""The report page: complete in itself, every section it is given, nothing it is not."""

import dataclasses
import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from wallwm_jax.config import ActionSpec
from wallwm_jax.evaluation import closed_loop, latency, open_loop, page, plots, report, video
from wallwm_jax.evaluation.base import Interval
from wallwm_jax.evaluation.loop_sections import Loop
from wallwm_jax.types import DataError

RNG = np.random.default_rng(0)
VOID = {'meta', 'img', 'br'}


class Reader(html.parser.HTMLParser):
  """Collects tags, attributes and text, and checks that tags nest."""

  def __init__(self, text: str):
    super().__init__()
    self.open, self.links, self.tags, self.text = [], [], [], []
    self.feed(text)
    assert not self.open, f'left open: {self.open}'

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [
      value for name, value in attrs if name in ('src', 'href', 'srcset', 'data', 'action')
    ]
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] != 'style':
      self.text.append(data)


@pytest.fixture(scope='module')
def full() -> report.Report:
  frames = RNG.integers(0, 256, (1, 2, 5, 16, 16, 3), dtype=np.uint8)
  truth = {
    'frames': frames,
    'num_frames': np.array([5]),
    'view_mask': np.ones((1, 2), bool),
    'pixel_mask': np.ones((1, 2, 16, 16), bool),
  }
  predicted = np.clip(frames / 255 + RNG.normal(0, 0.1, frames.shape), 0, 1)
  true = np.zeros((1, 4, 10))
  true[..., 3] = true[..., 7] = 1
  mask = np.ones(true.shape, bool)
  errors = open_loop.action_errors(true + 0.01, true, mask, ActionSpec())
  scores = closed_loop.evaluate([True, False], [100.0, 30.0], ['push', 'lift'])
  seam = {'seam_jump': 2.5, 'seam_jump_low': 2.0, 'seam_jump_high': 3.0, 'seam_jump_n': 2}
  some = Interval(1.5, 1.0, 2.0, 4)
  loop = Loop(
    results={'trained': scores, 'untrained': scores},
    motion={'trained': seam, 'untrained': {}},
    delays={'hold': {0: Interval(0.5, 0.2, 0.8, 2), 4: Interval(0.3, 0.1, 0.6, 2)}},
    reached=closed_loop.progress_reached([100.0, 30.0], ['push', 'lift']),
    rows=[{'attempt': 0, 'kind': 'push', 'success': True, 'time_s': math.nan}],
  )
  return report.Report(
    'A run <&>',
    'subtitle',
    cards=(report.Card('success', '50 %', 'note', 'good'), report.Card('other', '1')),
    losses={
      'stage 1': {'loss': (np.arange(5), np.linspace(2, 1, 5))},
      'stage 2': {'loss': (np.arange(5), np.linspace(1, -1, 5))},
    },
    closed_loop=loop,
    clips=[report.RolloutClip('push <it>', frames[0], True, 10.0, frames[0])],
    video=video.evaluate([(truth, {'model': predicted})]),
    strips=[
      report.VideoStrip('push the red cube', ('front', 'wrist'), predicted[0], frames[0], 10.0)
    ],
    video_checks={
      'gripper_px': {'epipolar': {'model': dataclasses.asdict(some)}},
      'caption_gap': {
        'psnr_own': 25.0, 'psnr_other': 24.0, 'gap': 1.0, 'gap_low': 0.5, 'gap_high': 1.5, 'n': 4
      },
    },
    open_loop=open_loop.summarise(errors, errors, errors, [0], ['push']),
    action_checks={
      'image_shuffle_increase': 0.1, 'image_shuffle_increase_low': 0.0,
      'image_shuffle_increase_high': 0.2, 'image_shuffle_n': 4,
      'by_action_steps': {'1': some, '4': some},
    },
    actions=[report.ActionTrace('push', true[0] + 0.01, true[0], true[0], mask[0])],
    latency=latency.measure_parts({'event': lambda: np.zeros(1)}, calls=3)
    | {
      'deadline_misses': {'event': {'10': 0.25}},
      'cold_start': {
        'empty cache': {
          'total_s': 4, 'import_s': 1, 'load_s': 1, 'first_chunk_s': 2, 'second_chunk_ms': 5
        }
      },
    },
    config={'model': {'width': 128}, 'name': 'tiny'},
    environment={'jax': '0.0', 'device': 'cpu'},
  )


def test_every_section_is_there_and_the_page_loads_nothing(full, tmp_path):
  path = report.write_report(tmp_path / 'deep' / 'report.html', full)
  text = path.read_text(encoding='utf-8')
  parsed = Reader(text)
  words = ' '.join(parsed.text)
  for expected in (
    'A run <&>',
    'Closed loop',
    'Predicted video',
    'Actions',
    'Training',
    'Latency',
    'Setup',
    'push the red cube',
    'copy last',
    'hold still',
    'untrained',
    'model.width',
    'stage 2',
    '50 %',
    'seam jump',
    'from the true path',
    '1.50 (1.00 – 2.00)',
    'lost by the other caption',
    'images of another event',
    '25.0 %',
    'empty cache',
  ):
    assert expected in words, expected
  ids = set(re.findall(r'id="([^"]+)"', text))
  for link in parsed.links:
    assert link.startswith('data:image/') or (link[0] == '#' and link[1:] in ids), link[:80]
  assert 'script' not in parsed.tags and 'link' not in parsed.tags
  assert not re.search(r'https?://|url\(|@import', text)


def test_every_image_decodes(full):
  text = report.render(full)
  images = [link for link in Reader(text).links if link.startswith('data:')]
  # bars, delays, progress, clip; curves, film rows; kinds, steps, trace; losses; latency
  assert len(images) == 4 + (1 + 4) + 3 + 1 + 1
  import base64
  import io

  from PIL import Image

  for uri in images:
    Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))).verify()


def test_empty_parts_are_left_out():
  words = ' '.join(Reader(report.render(report.Report('only this', environment={'jax': '1'}))).text)
  assert 'Setup' in words
  for absent in (
    'Closed loop',
    'Predicted video',
    'Actions',
    'Training',
    'Latency',
    'Configuration',
  ):
    assert absent not in words


def test_text_from_data_cannot_inject_html():
  strip = report.VideoStrip(
    '<script>x</script>',
    ('<b>',),
    np.zeros((1, 2, 12, 12, 3)),
    np.zeros((1, 2, 12, 12, 3), np.uint8),
    5.0,
  )
  assert 'script' not in Reader(report.render(report.Report('t', strips=[strip]))).tags


def test_curves_are_read_up_to_a_line_cut_short(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [
    json.dumps({'step': s, 'loss': 1.0 / s, 'video_loss': 2.0, 'lr': 1e-3}) for s in (10, 20)
  ]
  path.write_text('\n'.join(lines) + '\n{"step": 30, "lo')
  curves = report.read_curves(path)
  assert set(curves) == {'loss', 'video_loss'}
  np.testing.assert_allclose(curves['loss'], [[10, 20], [0.1, 0.05]])
  assert set(report.read_curves(path, ['lr'])) == {'lr'}


def test_broken_or_missing_metrics_are_errors(tmp_path):
  with pytest.raises(DataError, match='found no file'):
    report.read_curves(tmp_path / 'metrics.jsonl')
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1\n{"step": 2, "loss": 1}\n')
  with pytest.raises(DataError, match=r'metrics\.jsonl:1'):
    report.read_curves(path)


def test_smoothing_keeps_constants_and_length():
  np.testing.assert_allclose(plots.smooth(np.full(100, 3.0)), 3.0)
  ramp = np.arange(200.0)
  np.testing.assert_allclose(plots.smooth(ramp)[50:150], ramp[50:150])


def test_film_row_lays_frames_side_by_side():
  import io

  from PIL import Image

  frames = RNG.integers(0, 256, (3, 8, 10, 3), dtype=np.uint8)
  row = np.asarray(Image.open(io.BytesIO(page.film_row(frames))))
  assert row.shape == (8, 36, 3)
  for i in range(3):
    np.testing.assert_array_equal(row[:, 12 * i + 1 : 12 * i + 11], frames[i])


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
# Windows are at least 500 px wide, so the page is looked at in a frame of the width asked for.
FRAME = '<!doctype html><iframe width="{}" height="900" style="border:0" srcdoc="{}"></iframe>'
PROBE = """<script>
onload = () => {
const broken = [...document.images].filter(i => !(i.complete && i.naturalWidth)).length;
const wide = [...document.querySelectorAll('body *')].filter(
  e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1);
parent.document.body.dataset.probe = JSON.stringify({broken,
  width: innerWidth, images: document.images.length,
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  wide: wide.map(e => e.tagName + '.' + e.className)});
};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no chromium on PATH (apt-get install chromium)')
@pytest.mark.parametrize('width', [1200, 400])
def test_a_browser_shows_the_whole_page_without_scrolling_sideways(full, tmp_path, width):
  path = tmp_path / 'page.html'
  text = report.render(full).replace('</body>', f'{PROBE}</body>')
  path.write_text(FRAME.format(width, html.escape(text)), encoding='utf-8')
  command = [
    CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars',
    f'--user-data-dir={tmp_path}/profile', '--window-size=1300,900', '--enable-logging=stderr',
    '--dump-dom', path.as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  found = json.loads(html.unescape(re.search(r'data-probe="([^"]+)"', done.stdout)[1]))
  assert found['width'] == width and found['images'] == 14 and found['broken'] == 0
  assert found['over'] <= 0 and found['wide'] == []
  assert 'CONSOLE' not in done.stderr  # errors and warnings of the page
