"""Tables of wording: how an instruction may be put, and what the tasks of Meta-World consist of.

Plain data for `traces`. Held-out templates use only words that training templates use too.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
  """Instructions of one pattern (a regular expression for the whole text) and other wordings of
  them; the named groups of the pattern are the fields of the templates."""

  pattern: str
  train: tuple[str, ...]
  heldout: tuple[str, ...] = ()


_O = r'(?P<o>the .+)'
_INTO = r'(?P<p>on|in|into|onto|under)'

# The first that matches counts; the instruction itself is always a training wording.
FAMILIES = (
  Family(
    f'reach {_O}',
    ('go to {o}', 'move the gripper to {o}', 'bring the gripper to {o}'),
    ('go to {o} with the gripper',),
  ),
  Family(
    f'grasp {_O}',
    ('grab {o}', 'take hold of {o}', 'close the gripper on {o}'),
    ('grab hold of {o}',),
  ),
  Family(
    f'pick up {_O}',
    ('pick {o} up', 'grab {o} and lift it', 'take {o} and bring it up'),
    ('take hold of {o} and lift it up',),
  ),
  Family(f'lift {_O} off (?P<t>the .+)', ('raise {o} off {t}', 'bring {o} off {t}')),
  Family(f'lift {_O}', ('raise {o}', 'lift {o} up', 'bring {o} up'), ('raise {o} up',)),
  Family(
    f'move {_O} over (?P<t>the .+)',
    ('carry {o} over {t}', 'bring {o} above {t}', 'hold {o} above {t}'),
    ('carry {o} above {t}',),
  ),
  Family(
    f'place {_O} {_INTO} (?P<t>the .+)',
    ('set {o} down {p} {t}', 'bring {o} down {p} {t}', 'lower {o} so that it is {p} {t}'),
    ('lower {o} down {p} {t}',),
  ),
  Family(
    f'put {_O} {_INTO} (?P<t>the .+)',
    ('take {o} and put it {p} {t}', 'get {o} {p} {t}', 'pick up {o} and place it {p} {t}'),
    ('get hold of {o} and place it {p} {t}',),
  ),
  Family(
    f'release {_O}',
    ('let go of {o}', 'let {o} go', 'open the gripper and release {o}'),
    ('open the gripper and let go of {o}',),
  ),
  Family(
    rf'push {_O} (?P<d>left|right|forward|back)',
    ('slide {o} {d}', 'move {o} {d}', 'push {o} {d} with the gripper'),
    ('slide {o} {d} with the gripper',),
  ),
  Family(f'bring {_O} to (?P<t>the .+)', ('carry {o} to {t}', 'take {o} to {t}')),
  Family(f'take {_O} (?P<p>off|out of) (?P<t>the .+)', ('get {o} {p} {t}', 'pull {o} {p} {t}')),
  Family(f'insert {_O} into (?P<t>the .+)', ('put {o} into {t}', 'get {o} into {t}')),
  Family(f'press {_O} down', ('push {o} down', 'press down {o}'), ('push down {o}',)),
  Family(f'press {_O}', ('push on {o}', 'press down on {o}'), ('push down on {o}',)),
  Family(f'(?:pull|lift) {_O} up', ('raise {o}', 'bring {o} up'), ('raise {o} up',)),
  Family(f'open {_O}', ('open up {o}', 'get {o} open')),
  Family(f'close {_O}', ('shut {o}', 'get {o} closed'), ('get {o} shut',)),
  Family(f'turn {_O}', ('rotate {o}', 'give {o} a turn')),
  Family(f'slide {_O} into (?P<t>the .+)', ('get {o} into {t}', 'move {o} into {t}')),
  Family(f'hit {_O} with (?P<t>the .+)', ('take {t} and hit {o}', 'use {t} to hit {o}')),
)

# Two instructions in one: {a} and {b} are wordings of the first and the second.
JOINS = ('{a}, then {b}', 'first {a}, then {b}', '{a} and then {b}', '{a}, and after that {b}')
HELDOUT_JOINS = ('first {a} and after that {b}',)

# Ways to ask. A wording is asked in the first way and in one or two of the others.
FRAMES = ('{}', 'please {}', 'can you {}', 'now {}', '{} please', 'i want you to {}')
HELDOUT_FRAMES = ('can you please {}', 'now i want you to {}', 'please {} now')

# Reasoning traces, one set of words per style; which style follows from the way of asking.
STYLES = (
  'think: {task}. done: {done}. next: {next}. why: {why}. goal: {where}.',
  'think: i must {task}. so far: {done}. now i {next}, since {why}. goal: {where}.',
  'think: the task is to {task}. so far: {done}. so next: {next}. why: {why}. goal: {where}.',
)
HELDOUT_STYLES = (
  'think: i must {task}. done: {done}. so now: {next}, since {why}. the goal is {where}.',
  'think: the task: {task}. next i {next}. why: {why}. so far: {done}. goal: {where}.',
)

# Past tense of the verbs that captions start with.
PAST = {
  'bring': 'brought',
  'carry': 'carried',
  'close': 'closed',
  'get': 'got',
  'go': 'went',
  'grab': 'grabbed',
  'grasp': 'grasped',
  'hit': 'hit',
  'hold': 'held',
  'hook': 'hooked',
  'insert': 'inserted',
  'kick': 'kicked',
  'lift': 'lifted',
  'lock': 'locked',
  'lower': 'lowered',
  'move': 'moved',
  'open': 'opened',
  'pick': 'picked',
  'place': 'placed',
  'press': 'pressed',
  'pull': 'pulled',
  'push': 'pushed',
  'put': 'put',
  'raise': 'raised',
  'reach': 'reached',
  'release': 'released',
  'rotate': 'rotated',
  'slide': 'slid',
  'sweep': 'swept',
  'take': 'took',
  'turn': 'turned',
  'unlock': 'unlocked',
}

# Why an event is next, by the verb of its caption.
REASONS = {
  'reach': 'the gripper is not there',
  'grasp': 'it is not held',
  'lift': 'it is not up',
  'move': 'it is not there',
  'place': 'it is not down',
  'release': 'it is down and held',
  'push': 'it is not there',
  'pull': 'it is not there',
  'slide': 'it is not there',
  'press': 'it is not down',
  'insert': 'it is not in there',
  'hit': 'it is not in there',
  'open': 'it is not open',
  'close': 'it is not closed',
}
ANY_REASON = 'it is not done'

# What ends the part of a caption that is told of an event that is over: where to, or with what.
WHERE_TO = r' (?:over|on|in|into|onto|to|under|off|out|around|behind|from|with) .*'


class MetaWorldTask(NamedTuple):
  """instruction: what is asked for; objects: what it is about; phases: captions of its events in
  order, their first words the kinds of event."""

  instruction: str
  objects: tuple[str, ...]
  phases: tuple[str, ...]


def _task(instruction: str, objects: str, phases: str) -> MetaWorldTask:
  """Phases are separated by '; ', and a verb alone is about the first object."""
  things = tuple(f'the {name}' for name in objects.split(', '))
  full = (p if ' ' in p else f'{p} {things[0]}' for p in phases.split('; '))
  return MetaWorldTask(instruction, things, tuple(full))


# The 50 tasks of Meta-World, without their version suffix.
METAWORLD = {
  'assembly': _task(
    'put the nut on the peg',
    'nut, peg',
    'reach; grasp; lift; move the nut over the peg; place the nut on the peg',
  ),
  'basketball': _task(
    'put the ball in the hoop',
    'ball, hoop',
    'reach; grasp; lift; move the ball over the hoop; release',
  ),
  'bin-picking': _task(
    'put the cube in the other bin',
    'cube, other bin',
    'reach; grasp; lift; move the cube over the other bin; release',
  ),
  'box-close': _task(
    'put the lid on the box',
    'lid, box',
    'reach; grasp; lift; move the lid over the box; place the lid on the box',
  ),
  'button-press-topdown': _task('press the button from above', 'button', 'reach; press'),
  'button-press-topdown-wall': _task(
    'press the button behind the wall from above', 'button, wall', 'reach; press'
  ),
  'button-press': _task('press the button', 'button', 'reach; press'),
  'button-press-wall': _task(
    'press the button behind the wall',
    'button, wall',
    'move the gripper over the wall; reach; press',
  ),
  'coffee-button': _task(
    'press the button of the coffee machine', 'button, coffee machine', 'reach; press'
  ),
  'coffee-pull': _task(
    'pull the mug away from the coffee machine',
    'mug, coffee machine',
    'reach; grasp; pull the mug back',
  ),
  'coffee-push': _task(
    'put the mug under the coffee machine',
    'mug, coffee machine',
    'reach; grasp; push the mug under the coffee machine',
  ),
  'dial-turn': _task('turn the dial', 'dial', 'reach; turn'),
  'disassemble': _task(
    'take the nut off the peg', 'nut, peg', 'reach; grasp; lift the nut off the peg'
  ),
  'door-close': _task('close the door', 'door', 'reach; close'),
  'door-lock': _task('lock the door', 'lock, door', 'reach; turn; lock the door'),
  'door-open': _task('open the door', 'handle, door', 'reach; pull; open the door'),
  'door-unlock': _task('unlock the door', 'lock, door', 'reach; turn; unlock the door'),
  'hand-insert': _task(
    'insert the gripper into the hole',
    'hole, gripper',
    'reach; lower the gripper; insert the gripper into the hole',
  ),
  'drawer-close': _task('close the drawer', 'drawer', 'reach; close'),
  'drawer-open': _task('open the drawer', 'handle, drawer', 'reach; pull; open the drawer'),
  'faucet-open': _task('open the faucet', 'faucet', 'reach; turn'),
  'faucet-close': _task('close the faucet', 'faucet', 'reach; turn'),
  'hammer': _task(
    'hit the nail with the hammer',
    'hammer, nail',
    'reach; grasp; lift; move the hammer to the nail; hit the nail',
  ),
  'handle-press-side': _task(
    'press the handle at the side down', 'handle', 'reach; press the handle down'
  ),
  'handle-press': _task('press the handle down', 'handle', 'reach; press the handle down'),
  'handle-pull-side': _task(
    'pull the handle at the side up', 'handle', 'reach; pull the handle up'
  ),
  'handle-pull': _task('pull the handle up', 'handle', 'reach; pull the handle up'),
  'lever-pull': _task('pull the lever up', 'lever', 'reach; pull the lever up'),
  'pick-place-wall': _task(
    'bring the puck over the wall to the goal',
    'puck, wall, goal',
    'reach; grasp; lift; move the puck over the wall; move the puck to the goal',
  ),
  'pick-out-of-hole': _task(
    'take the puck out of the hole',
    'puck, hole',
    'reach; grasp; lift the puck out of the hole; move the puck to the goal',
  ),
  'pick-place': _task(
    'bring the puck to the goal', 'puck, goal', 'reach; grasp; lift; move the puck to the goal'
  ),
  'plate-slide': _task(
    'slide the plate into the cabinet',
    'plate, cabinet',
    'reach; slide the plate into the cabinet',
  ),
  'plate-slide-side': _task(
    'slide the plate into the cabinet at the side',
    'plate, cabinet',
    'reach; slide the plate into the cabinet',
  ),
  'plate-slide-back': _task(
    'take the plate out of the cabinet',
    'plate, cabinet',
    'reach; slide the plate out of the cabinet',
  ),
  'plate-slide-back-side': _task(
    'take the plate out of the cabinet at the side',
    'plate, cabinet',
    'reach; slide the plate out of the cabinet',
  ),
  'peg-insert-side': _task(
    'insert the peg into the hole',
    'peg, hole',
    'reach; grasp; lift; move the peg to the hole; insert the peg into the hole',
  ),
  'peg-unplug-side': _task(
    'pull the peg out of the hole',
    'peg, hole',
    'reach; grasp; pull the peg out of the hole',
  ),
  'soccer': _task('kick the ball into the goal', 'ball, goal', 'reach; push the ball to the goal'),
  'stick-push': _task(
    'push the box with the stick',
    'stick, box',
    'reach; grasp; lift; move the stick to the box; push the box',
  ),
  'stick-pull': _task(
    'pull the box with the stick',
    'stick, box',
    'reach; grasp; lift; move the stick to the box; pull the box',
  ),
  'push': _task('push the puck to the goal', 'puck, goal', 'reach; push the puck to the goal'),
  'push-wall': _task(
    'push the puck around the wall to the goal',
    'puck, wall, goal',
    'reach; push the puck around the wall; push the puck to the goal',
  ),
  'push-back': _task(
    'pull the puck back to the goal', 'puck, goal', 'reach; grasp; pull the puck back to the goal'
  ),
  'reach': _task('reach the goal', 'goal', 'reach'),
  'reach-wall': _task(
    'reach the goal behind the wall', 'goal, wall', 'move the gripper over the wall; reach'
  ),
  'shelf-place': _task(
    'put the puck on the shelf',
    'puck, shelf',
    'reach; grasp; lift; move the puck to the shelf; place the puck on the shelf',
  ),
  'sweep-into': _task(
    'sweep the puck into the hole', 'puck, hole', 'reach; grasp; sweep the puck into the hole'
  ),
  'sweep': _task(
    'sweep the puck off the table', 'puck, table', 'reach; grasp; sweep the puck off the table'
  ),
  'window-open': _task('open the window', 'handle, window', 'reach; push; open the window'),
  'window-close': _task('close the window', 'handle, window', 'reach; push; close the window'),
}
