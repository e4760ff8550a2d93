"""Hostile messages at every door of a service, with a correct client beside.

`python benchmarks/bench_fuzz.py --help`. Doors: the services of gRPC, the metrics port, and, with `--cluster ray`, the unix sockets and TCP
ports of the hosts. Exit code 1: an answer to the correct client was wrong, late or missing, a stranger was told of a mistake of ours, a
process has died, the log has a traceback, or something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

from doors import MISTAKES, Grpc, Knock, Sockets
from hostile import Hostile
from running import Correct, Running, Seen, correct_client, service, table

#: how often each door is knocked at, relative to the others; a knock may be several messages
WEIGHTS = {
    "Forward": 40,
    "ForwardStream": 1,
    "ModelInfer": 20,
    "GRPCInferenceService, others": 5,
    "AdminService": 5,
    "ControlService": 2,
    "metrics port": 3,
    "unix socket of a host": 3,
}
AT_ONCE = 32
#: what is left of caches and of threads that come with the first calls
ALLOWED_MIB, ALLOWED_FEW = 200, 16


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as name, service(Path(name), options.cluster) as running:
        with correct_client(running, Path(name)) as found:
            before, began = running.seen(), time.monotonic()
            outcomes = asyncio.run(knock(running, options.messages, options.seed))
        seconds, wrongs = time.monotonic() - began, []
        try:
            after, gauges = settled(running, before)
        except FileNotFoundError:
            raise SystemExit("a process of the service has died:\n" + running.log.read_text()[-2000:]) from None
        total = sum(outcome.total() for outcome in outcomes.values())
        print(f"{total} hostile messages in {seconds:.0f} s, seed {options.seed}, hosts: {options.cluster}\n")
        print("| door | messages | what came of them |\n|---|--:|---|")
        for door, outcome in outcomes.items():
            print(f"| {door} | {outcome.total()} | {', '.join(f'{what} {count}' for what, count in outcome.most_common())} |")
            wrongs += [f"{door}: {what} {outcome[what]} times" for what in MISTAKES if outcome[what]]
        print("\n| correct client: calls | wrong | failed | p50 ms | p99 ms | most ms |\n|--:|--:|--:|--:|--:|--:|")
        print(f"| {found[0]} |\n", *table(before, after), sep="\n")
        wrongs += unlike(before, after, gauges) + disturbed(found[0], options.bound_ms)
        if "Traceback" in running.log.read_text():
            wrongs.append("the log has a traceback:\n" + running.log.read_text()[-3000:])
    print("\nnothing is wrong" if not wrongs else "\nWRONG:\n" + "\n".join(wrongs))
    raise SystemExit(bool(wrongs))


async def knock(running: Running, messages: int, seed: int) -> dict[str, Counter[str]]:
    """AT_ONCE strangers, each with a seed of his own, go from door to door until so many messages were sent."""
    outcomes: dict[str, Counter[str]] = {}

    async def stranger(number: int) -> None:
        hostile = Hostile(seed * AT_ONCE + number)
        doors = Grpc(running, hostile), Sockets(running, hostile)
        knocks: dict[str, Knock] = {name: one for door in doors for name, one in door.knocks().items()}
        weights = [WEIGHTS.get(name, 1) for name in knocks]
        while sum(outcome.total() for outcome in outcomes.values()) < messages:
            (name,) = hostile.chance.choices(list(knocks), weights)
            outcomes.setdefault(name, Counter()).update(await knocks[name]())
        for door in doors:
            await door.close()

    await asyncio.gather(*map(stranger, range(AT_ONCE)))
    return outcomes


def settled(running: Running, before: dict[str, Seen], patience_s: float = 60) -> tuple[dict[str, Seen], dict[str, float]]:
    """As soon as nothing is left behind, or when there was time enough."""
    end = time.monotonic() + patience_s
    while True:
        after, gauges = running.seen(), running.gauges()
        if not unlike(before, after, gauges) or time.monotonic() > end:
            return after, gauges
        time.sleep(0.5)


def unlike(before: dict[str, Seen], after: dict[str, Seen], gauges: dict[str, float]) -> list[str]:
    found = [f"{name} is {value:g}" for name, value in gauges.items() if value]
    for name, was in before.items():
        now = after[name]
        if now.resident_mib > was.resident_mib + ALLOWED_MIB:
            found.append(f"{name} has grown from {was.resident_mib:.0f} to {now.resident_mib:.0f} MiB")
        if now.descriptors > was.descriptors + ALLOWED_FEW or now.threads > was.threads + ALLOWED_FEW:
            found.append(f"{name} has {now.descriptors} descriptors and {now.threads} threads; it had {was.descriptors} and {was.threads}")
    return found


def disturbed(client: Correct, bound_ms: float) -> list[str]:
    found = [f"the correct client got {client.wrong} wrong answers"] if client.wrong else []
    found += [f"the correct client failed {count} times: {why}" for why, count in client.failed.items()]
    slowest = client.quantile_ms(1)
    return found + ([f"the correct client waited {slowest:.0f} ms; allowed: {bound_ms:g}"] if slowest > bound_ms else [])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cluster", choices=("ray", "threads"), default="ray")
    parser.add_argument("--bound-ms", type=float, default=2000, help="of the slowest call of the correct client")
    return parser.parse_args()


if __name__ == "__main__":
    main()
