"""The evaluation protocols of domain-generalizable person ReID: who is a source, who is a target, which images train.

One row of a protocol is a `Direction`: train on `sources`, never see `target`, evaluate on the target's query and
gallery. Short names used in the literature: M Market-1501, MS MSMT17, CS CUHK-SYSU, C2 CUHK02, C3 CUHK03.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lda.data import catalogue, own
from lda.errors import UsageError, unknown

SourcePart = Literal["train", "all"]


@dataclass(frozen=True)
class Protocol:
    """One evaluation protocol.

    Attributes:
        name: the name on the command line.
        title: the name in print.
        source_part: "train" takes a source's training part only, "all" joins train, query and gallery (distractors
            and junk removed).
        directions: target -> its sources, in the order tables print them.
        num_splits: random test splits per target; 1 where the data set has one official query and gallery.
    """

    name: str
    title: str
    source_part: SourcePart
    directions: Mapping[str, tuple[str, ...]]
    num_splits: int = 1

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets in table order."""
        return tuple(self.directions)

    def sources(self, target: str) -> tuple[str, ...]:
        """The source domains that train for `target`. Raises UsageError for a target the protocol lacks."""
        if target not in self.directions:
            raise UsageError(unknown(f"target of {self.title}", target, self.directions))
        return self.directions[target]


_PROTOCOL_1_SOURCES = ("market1501", "cuhk02", "cuhk03", "cuhk_sysu")
_LEAVE_ONE_OUT = {
    "cuhk03": ("market1501", "msmt17", "cuhk_sysu"),
    "msmt17": ("market1501", "cuhk_sysu", "cuhk03"),
    "market1501": ("msmt17", "cuhk_sysu", "cuhk03"),
}

PROTOCOLS: dict[str, Protocol] = {
    "protocol1": Protocol(
        "protocol1",
        "Protocol-1",
        "all",
        {target: _PROTOCOL_1_SOURCES for target in ("prid", "grid", "viper", "ilids")},
        num_splits=10,
    ),
    "protocol2": Protocol("protocol2", "Protocol-2", "train", _LEAVE_ONE_OUT),
    "protocol3": Protocol("protocol3", "Protocol-3", "all", _LEAVE_ONE_OUT),
    # Not a generalisation protocol: the upper bound that trains on the target's own training part.
    "in_domain": Protocol(
        "in_domain", "in-domain (not DG)", "train", {name: (name,) for name in ("cuhk03", "msmt17", "market1501")}
    ),
}


def names() -> tuple[str, ...]:
    """Every protocol's name, your own last. Raises UsageError for a mistake in the files of your own."""
    return (*PROTOCOLS, *_own())


def get_protocol(name: str) -> Protocol:
    """Look a protocol up by name. Raises UsageError naming the nearest valid one, or a mistake in those of your own."""
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    found = _own()
    if name not in found:
        raise UsageError(f"{unknown('protocol', name, names())}; your own are where {own.VARIABLE} says")
    return found[name]


def _own() -> dict[str, Protocol]:
    found = {}
    for name, described in own.protocols().items():
        if name in PROTOCOLS:
            raise UsageError(f"{described.place}: name: {name!r} stands in lda/protocols.py; choose another name")
        known = catalogue.names()
        for data_set, place in (*described.sources.items(), *described.targets.items()):
            if data_set not in known:
                raise UsageError(f"{place}: {unknown('data set', data_set, known)}")
        directions = {
            target: tuple(source for source in described.sources if source != target) for target in described.targets
        }
        found[name] = Protocol(name, described.title, described.source_part, directions)
    return found
