"""Equal compute: how many steps of a method cost as much as the plain network's steps do."""

from __future__ import annotations

import dataclasses
import functools

from lda import methods
from lda.config import Config
from lda.protocols import get_protocol

_IDS = 16  # identities of a source in a network that is only built to ask what it costs


def at_equal_passes(config: Config) -> Config:
    """The run with as many steps an epoch as cost what its epochs cost the plain network, in training passes.

    Epochs stay what they are, and with them warm-up, milestones and validations; the steps of one are rounded, and
    never less than one.
    """
    steps = config.schedule.steps_per_epoch
    return config.replace(steps_per_epoch=max(1, round(steps / train_passes(config))))


def train_passes(config: Config) -> float:
    """Training passes per image and step that the run's method declares; see `lda.methods.base.Cost`."""
    sources = len(get_protocol(config.run.protocol).sources(config.run.target))
    return _declared(config.replace(protocol="protocol1", target="prid", seed=0), sources)


@functools.lru_cache(maxsize=256)
def _declared(config: Config, sources: int) -> float:
    setup = config.replace(pretrained="none").setup([_IDS] * sources)  # whatever weights it begins with
    return methods.build(config.method, dataclasses.replace(setup, fresh=False)).cost.train_passes
