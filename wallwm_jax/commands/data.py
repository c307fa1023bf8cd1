"""`wallwm data build|cluster|encode|inspect|stats|verify|doctor|report|demo`: raw episodes to an
event store, and looks into it.
"""

from __future__ import annotations

import argparse

from wallwm_jax.commands import common, settings


def add_parser(verbs) -> None:
  group = verbs.add_parser(
    'data', help='build an event store, look into it, check it', allow_abbrev=False
  )
  actions = group.add_subparsers(dest='action', required=True, metavar='action')

  example = (
    'wallwm data build --reader rlds --source ../shared/data/bridge_rlds --out runs/bridge/store'
  )
  build_ = common.add_verb(
    actions, 'build', 'build an event store from raw episodes', example, run=build
  )
  build_.add_argument('--reader', required=True, choices=tuple(READERS), help='what the source is')
  build_.add_argument('--source', help='folder of the raw data (lerobot, rlds, video)')
  build_.add_argument(
    '--spec', help='lerobot, rlds: YAML file that says what state and action mean (known layouts)'
  )
  build_.add_argument('--out', required=True, help='new folder for the store')
  build_.add_argument(
    '--heldout', type=float, help='fraction of held-out episodes (0.2; appending: the store\'s)'
  )
  build_.add_argument(
    '--prepare',
    nargs='?',
    const='sync,clean,segment,caption',
    metavar='STEPS',
    help='lerobot, rlds, video: prepare episodes on the way, by all of sync,clean,segment,caption '
    'or the named steps (one more is prune, which cuts idle stretches short)',
  )
  build_.add_argument(
    '--format',
    choices=('store', 'lerobot'),
    default='store',
    help='event store, or a LeRobot v3.0 data set of the same episodes (store)',
  )
  build_.add_argument('--codec', choices=('zstd', 'h264'), help='pixels: exact or small (zstd)')
  build_.add_argument('--crf', type=int, help='h264: rate factor, 0 (best) .. 51 (20)')
  build_.add_argument(
    '--append', action='store_true', help='add what is new to the finished store at --out'
  )
  build_.add_argument(
    '--resume', action='store_true', help='go on where a killed build stopped'
  )
  build_.add_argument('--split', default='train', help='rlds: split to read (train)')
  build_.add_argument(
    '--size', help='height x width in px (video 96x160, tabletop 48x48, metaworld 96x96)'
  )
  build_.add_argument('--fps', type=float, help='video: frames per second to keep (all)')
  build_.add_argument('--event-frames', type=int, default=65, help='video: frames per event (65)')
  build_.add_argument(
    '--episodes', type=int, default=200, help='simulators: episodes to collect (200)'
  )
  build_.add_argument(
    '--tasks', default='MT10', help='metaworld: MT10, MT50 or tasks such as reach,push (MT10)'
  )
  build_.add_argument(
    '--noise', type=float, default=0.0, help='metaworld: noise on executed commands, 0..1 (0)'
  )
  build_.add_argument(
    '--processes', type=int, help='metaworld: that record at once (one per core)'
  )
  build_.add_argument('--mix', default='mixed', help='tabletop: mixed, single or multi (mixed)')
  build_.add_argument(
    '--recovery', type=float, default=0.0, help='tabletop: part that recovers from a miss (0)'
  )
  build_.add_argument('--seed', type=int, default=0, help='simulators: seed (0)')

  summary = 'what a store holds and what was quarantined; what raw data is and what its spec lacks'
  parser = common.add_verb(
    actions, 'inspect', summary, 'wallwm data inspect runs/bridge/store', run=inspect
  )
  parser.add_argument('path', help='folder of a store or of raw data (lerobot, rlds, video)')

  summary = 'read every byte of a store and compare its checksums'
  parser = common.add_verb(
    actions, 'verify', summary, 'wallwm data verify runs/bridge/store', run=verify
  )
  parser.add_argument('store', help='folder of the store')

  example = (
    'wallwm data stats runs/bridge/store --config experiments/bridge_sample.py --out stats.json'
  )
  stats_ = common.add_verb(
    actions, 'stats', 'normalisation statistics of a store', example, run=stats, overrides=[]
  )
  stats_.add_argument('store', help='folder of the store')
  stats_.add_argument('--config', required=True, help='experiment whose windows are measured')
  stats_.add_argument('--out', help='JSON file to write (default: print only)')
  _add_cluster(actions)
  _add_encode(actions)
  _add_doctor(actions)
  report_ = common.add_verb(
    actions,
    'report',
    'one page: what was refused, lags, boundaries, captions, clusters, packing',
    'wallwm data report runs/bridge/store --out bridge.html',
    run=report,
  )
  report_.add_argument('store', help='folder of the store')
  report_.add_argument('--clusters', help='folder of the labels (STORE/clusters/default, if any)')
  report_.add_argument('--out', required=True, help='HTML file to write')
  demo_ = common.add_verb(
    actions,
    'demo',
    'tabletop -> LeRobot v3 -> sync, clean, segment, caption -> store -> clusters -> packed '
    'batches, and how much of the truth was found',
    'wallwm data demo --out runs/data-demo',
    run=demo,
  )
  demo_.add_argument('--size', choices=('full', 'ci'), default='full', help='ci: a third of it')
  demo_.add_argument('--out', default='runs/data-demo', help='new folder (runs/data-demo)')


def _add_cluster(actions) -> None:
  parser = common.add_verb(
    actions,
    'cluster',
    'group events by what is seen and said, and by how the robot moves, for balanced sampling',
    'wallwm data cluster runs/bridge/store --vl 64 --act 16',
    run=cluster,
  )
  parser.add_argument('store', help='folder of the store')
  parser.add_argument('--out', help='new folder for the labels (STORE/clusters/default)')
  parser.add_argument('--vl', type=int, default=512, help='most clusters of what is seen (512)')
  parser.add_argument('--act', type=int, default=64, help='most clusters of motions (64)')
  parser.add_argument('--seed', type=int, default=0, help='of the k-means (0)')


def _add_doctor(actions) -> None:
  example = 'wallwm data doctor runs/bridge/store --config experiments/bridge_sample.py'
  parser = common.add_verb(
    actions,
    'doctor',
    'check units, conventions and normalisation statistics; exit code 1 if training would suffer',
    example,
    run=doctor,
    overrides=[],
  )
  parser.add_argument('store', help='folder of the store')
  parser.add_argument('--config', required=True, help='experiment that is to be trained')
  parser.add_argument('--stats', help='JSON file of `wallwm data stats` (default: compute them)')


def _add_encode(actions) -> None:
  example = (
    'wallwm data encode runs/bridge/store --config experiments/bridge_sample.py '
    '--codec wan2_2 --weights runs/weights/vae --out runs/bridge/latents'
  )
  parser = common.add_verb(
    actions,
    'encode',
    'codec latents of every event, for training without the codec',
    example,
    run=encode,
    overrides=[],
  )
  parser.add_argument('store', help='folder of the event store')
  parser.add_argument('--config', required=True, help='experiment whose windows are encoded')
  parser.add_argument('--codec', help="dct, wan2_1 or wan2_2 (the config's)")
  parser.add_argument('--weights', help="folder of the converted VAE (the config's)")
  parser.add_argument('--out', required=True, help='new folder for the latents')
  parser.add_argument('--batch', type=int, default=4, help='events encoded at once (4)')
  parser.add_argument('--dtype', default='float16', choices=('float16', 'float32'))


def _lerobot(args):
  from wallwm_jax.data.readers.lerobot import LeRobotReader

  return LeRobotReader(args.source, _spec(args))


def _rlds(args):
  from wallwm_jax.data.readers.rlds import RldsReader

  return RldsReader(args.source, args.split, _spec(args))


def _spec(args):
  from wallwm_jax.data.readers.spec import load_spec

  return load_spec(args.spec) if args.spec else None


def _video(args):
  from wallwm_jax.data.readers.video import VideoReader

  return VideoReader(args.source, _image_size(args.size or '96x160'), args.fps, args.event_frames)


def _tabletop(args):
  from wallwm_jax.envs import tabletop

  world = tabletop.TabletopConfig(image_size=_image_size(args.size or '48x48'))
  return tabletop.collect(
    args.episodes, args.seed, mix=args.mix, recovery=args.recovery, config=world
  )


def _metaworld(args):
  from wallwm_jax.envs import metaworld

  return metaworld.collect(
    args.episodes,
    args.seed,
    tasks=args.tasks,
    size=_image_size(args.size or '96x96'),
    noise=args.noise,
    processes=args.processes,
  )


def _image_size(text: str) -> tuple[int, int]:
  from wallwm_jax.types import ConfigError

  height, cross, width = text.partition('x')
  if not (cross and height.isdigit() and width.isdigit()):
    raise ConfigError(f'--size: expected height x width in pixels such as 96x160, got {text!r}.')
  return int(height), int(width)


READERS = {
  'lerobot': _lerobot,
  'rlds': _rlds,
  'video': _video,
  'tabletop': _tabletop,
  'metaworld': _metaworld,
}
SIMULATORS = ('tabletop', 'metaworld')  # need no source, and record what is true


def build(args: argparse.Namespace) -> None:
  from wallwm_jax.data.build import build_store
  from wallwm_jax.data.prepare import Prepared, PrepareSettings
  from wallwm_jax.types import ConfigError

  simulated = args.reader in SIMULATORS
  if not simulated and not args.source:
    raise ConfigError(
      f'--source: expected the folder of the raw data (--reader {args.reader}), got none.'
    )
  if simulated and args.prepare:
    raise ConfigError(f'--prepare: {args.reader} records what is true; leave it out.')
  total = args.episodes if simulated else None
  if args.format == 'lerobot' and (args.append or args.resume or args.heldout is not None):
    raise ConfigError('--format lerobot: --append, --resume and --heldout are of stores only.')
  episodes = READERS[args.reader](args)
  with common.progress_on_stderr():
    if args.prepare:
      steps = PrepareSettings.of(args.prepare.split(','))
      episodes = Prepared(episodes, steps, progress=True)
      lags = [lag.to_dict() for lag in episodes.lags.values()]
    if args.format == 'lerobot':
      report = _write_lerobot(episodes, args)
    else:
      report = build_store(
        episodes,
        args.out,
        heldout=0.2 if args.heldout is None and not args.append else args.heldout,
        total=total,
        codec=args.codec,
        crf=args.crf,
        append=args.append,
        resume=args.resume,
      )
  if args.prepare:
    report['lags'] = lags
  if args.reader == 'metaworld':
    report['experts'] = {task: vars(tally) for task, tally in episodes.attempts.items()}
  common.print_json(report)


def _write_lerobot(episodes, args: argparse.Namespace) -> dict:
  from wallwm_jax.data.writers.lerobot import WriteSettings, write_lerobot
  from wallwm_jax.types import ConfigError

  if args.codec not in (None, 'h264'):
    raise ConfigError(f'--format lerobot: expected --codec h264 or none, got {args.codec}.')
  chosen = {'robot': 'sawyer' if args.reader == 'metaworld' else 'unknown'}
  if args.crf is not None:
    chosen['crf'] = args.crf
  return write_lerobot(episodes, args.out, WriteSettings(**chosen))


def cluster(args: argparse.Namespace) -> None:
  from wallwm_jax.data.cluster import ClusterSettings, cluster_sizes, cluster_store
  from wallwm_jax.data.store import EventStore

  settings = ClusterSettings(vl=args.vl, act=args.act, seed=args.seed)
  labels = cluster_store(EventStore(args.store), settings=settings, out=args.out)
  sizes = {side: counts.tolist() for side, counts in cluster_sizes(labels).items()}
  common.print_json({'events': len(labels.uid), 'sha256': labels.sha256, 'sizes': sizes})


def report(args: argparse.Namespace) -> None:
  from wallwm_jax.evaluation.data_report import write_data_report

  print(write_data_report(args.store, args.out, clusters=args.clusters))


def demo(args: argparse.Namespace) -> None:
  from wallwm_jax.commands import data_tour

  with common.progress_on_stderr():
    summary = data_tour.run(args.size, args.out)
  common.print_json(summary)


def inspect(args: argparse.Namespace) -> None:
  import yaml

  from wallwm_jax.data.inspect import show
  from wallwm_jax.data.readers.probe import probe, raw_format
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.evaluation.base import to_plain

  if raw_format(args.path):
    print(yaml.safe_dump(to_plain(probe(args.path)), sort_keys=False, default_flow_style=None))
  else:
    show(EventStore(args.path))


def verify(args: argparse.Namespace) -> None:
  from wallwm_jax.data import faults, latents
  from wallwm_jax.data.store import EventStore

  kind = latents if latents.holds_latents(args.store) else faults
  faults.refuse(args.store, kind.find_faults(args.store))
  store = (latents.LatentStore if kind is latents else EventStore)(args.store)
  print(f'{store.path}: complete and unchanged, digest {store.digest}')


def stats(args: argparse.Namespace) -> None:
  from wallwm_jax.data import stats as statistics
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.training.pretrained import latent_encoder

  config = settings.load_experiment(args.config, args.overrides)
  store = EventStore(args.store)
  norm = statistics.compute(store, config, latent_encoder(config.model))
  if args.out:
    statistics.save(norm, args.out, statistics.summarise(store, config))
  common.print_json({'hash': statistics.stats_hash(norm)} | vars(norm))


def doctor(args: argparse.Namespace) -> None:
  from wallwm_jax.data import doctor as doctors
  from wallwm_jax.data import stats as statistics
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.types import DataError

  config = settings.load_experiment(args.config, args.overrides)
  given = (statistics.load(args.stats), statistics.load_summary(args.stats)) if args.stats else ()
  found = doctors.diagnose(EventStore(args.store), config, *given)
  doctors.show(found)
  severe = sum(d.severity == 'severe' for d in found)
  if severe:
    raise DataError(f'{args.store}: {severe} severe findings, see the table above.')


def encode(args: argparse.Namespace) -> None:
  import functools

  import jax

  from wallwm_jax.data.encode import encode_store
  from wallwm_jax.data.store import EventStore
  from wallwm_jax.models import functional
  from wallwm_jax.training.pretrained import codec_digest, load_codec

  config = _with_codec(settings.load_experiment(args.config, args.overrides), args)
  codec = load_codec(config.model)
  run_codec = jax.jit(functools.partial(functional.encode_video, config.model))
  with common.progress_on_stderr():
    report = encode_store(
      config,
      EventStore(args.store),
      lambda frames: run_codec(frames, codec),
      args.out,
      codec_digest=codec_digest(config.model),
      batch_size=args.batch,
      dtype=args.dtype,
    )
  common.print_json({'out': args.out} | report)


def _with_codec(config, args: argparse.Namespace):
  """The config with the codec that --codec and --weights name; it codes event windows."""
  import dataclasses

  from wallwm_jax import presets
  from wallwm_jax.config import nearest
  from wallwm_jax.types import ConfigError

  codec = config.model.codec
  if args.codec:
    if args.codec not in presets.CODECS:
      raise ConfigError(f'--codec {args.codec!r}: unknown.{nearest(args.codec, presets.CODECS)}')
    codec = dataclasses.replace(presets.CODECS[args.codec], weights=codec.weights)
  if args.weights:
    codec = dataclasses.replace(codec, weights=args.weights)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, codec=codec),
    data=dataclasses.replace(config.data, window='event', latents=''),
  )
