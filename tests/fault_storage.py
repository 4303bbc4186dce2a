"""Faults of the storage: a database that crashes, a network that is cut."""

from __future__ import annotations

import time

from fault_arena import Arena, Play, ip, named, namespace, points, training
from studies import wait_for


@named("PostgreSQL crashed and restarted")
def postgresql_restarted(arena: Arena) -> Play:
    server = arena.server()
    command = arena.command()
    process = command.start()
    for trial in (0, 1):
        wait_for(training(command, trial), process=process)
        server.stop()
        time.sleep(2)
        server.start()
    return 2, [command], process.wait(300)


@named("network cut longer than the grace period (PostgreSQL)")
def network_cut(arena: Arena) -> Play:
    """The second machine is a network namespace; its link goes down, its trial is taken over, its link comes back."""
    name, address = arena.stack.enter_context(namespace())
    arena.server()
    assert arena.url is not None
    arena.url = arena.url.replace("127.0.0.1", address)
    many = points(12)  # for the second machine to find work when it is up
    first, second = arena.command("a", search=many), arena.command("b", search=many)
    second.prefix = ("ip", "netns", "exec", name)
    one = first.start()
    wait_for(training(first, 0), process=one)
    two = second.start("--join")
    wait_for(lambda: bool(list(second.study.glob("trial-*/*/metrics.jsonl"))), process=two)
    (cut,) = {path.parts[-3] for path in second.study.glob("trial-*/*/metrics.jsonl")}
    ip("netns", "exec", name, "ip", "link", "set", "lda1", "down")
    again = f"{cut} will be tried again"
    wait_for(lambda: any(again in event for event in first.events()), 120, one)
    ip("netns", "exec", name, "ip", "link", "set", "lda1", "up")
    return 1, [first, second], max(one.wait(300), two.wait(300))
