"""Serve a policy: `python -m openpi_opt.serve preset=h100 checkpoint=FOLDER robot=libero`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpi_opt import cli
from openpi_opt.errors import UserError
from openpi_opt.verbs import verb_parser

if TYPE_CHECKING:
    from openpi_opt.deploy import ReadyPolicy
    from openpi_opt.serve.server import PolicyServer

_OWN = ("preset", "preset_dir", "checkpoint", "robot", "tokenizer", "norm_stats", "store")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_EPILOG = """keys of this command, as key=value:
  preset=NAME         knobs, model and workload (preset_dir=FOLDER where it is elsewhere)
  checkpoint=FOLDER   openpi's or LeRobot's; without it weights are random, for measuring only
  robot=NAME|FILE     libero, droid, aloha, or a YAML of your own
  tokenizer=FILE      PaliGemma's SentencePiece model
  norm_stats=FILE     openpi's statistics, where the checkpoint has none
  store=FOLDER        where it is remembered what the guard has passed (~/.cache/openpi_opt)
every other key=value is an override as of sweep: workload.horizon=10 workload.layout=flexible
Clients are openpi-client's WebsocketClientPolicy(host, port); GET /healthz answers OK."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `settings` holds the keys of this command, `overrides` the others."""
    parser = verb_parser(
        "serve",
        description="Serve a policy to robots, by openpi's websocket protocol.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="see below")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--queue", type=cli.at_least(1), default=8, help="requests that may wait")
    parser.add_argument("--max-mib", type=cli.at_least(1), default=64, help="of a message (64)")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not ask the guard before the first start"
    )
    robot = parser.add_argument_group("closed loop against this server, which then ends")
    robot.add_argument("--fake-robot", type=_rate, metavar="HZ", help="ask HZ times a second")
    robot.add_argument("--seconds", type=_rate, default=60.0, help="how long (60)")
    robot.add_argument("--clients", type=cli.at_least(1), default=1, help="robots at once (1)")
    robot.add_argument("--out", type=Path, default=Path("fake_robot"), help="plot and samples")
    arguments = parser.parse_intermixed_args(argv)
    arguments.settings, arguments.overrides = {}, []
    for text in arguments.keys:
        key, given, value = text.partition("=")
        if not given:
            parser.error(f"{text!r} is no KEY=VALUE")
        if key in _OWN:
            arguments.settings[key] = value
        else:
            arguments.overrides.append(text)
    return arguments


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Load, warm up, listen; SIGTERM and Ctrl-C answer what was asked and end."""
    arguments = parse(argv)
    if "robot" not in arguments.settings:
        raise UserError("serve needs robot=NAME: libero, droid, aloha, or a YAML of your own.")
    try:
        from openpi_opt.serve.server import PolicyServer
    except ImportError as error:
        raise UserError(f"serve needs {error.name}: pip install 'openpi_opt[serve]'.") from error
    policy = _policy(arguments)
    cli.say(f"first answer after {policy.load_seconds + policy.warm_up():.1f} s")
    gc.collect()
    gc.freeze()  # what loading made stays: no collection looks through it while a robot waits
    if arguments.host not in _LOOPBACK:
        cli.say(
            f"warning: --host {arguments.host} lets everyone who reaches this port command the "
            "policy and read its answers; nothing is encrypted."
        )
    return asyncio.run(_serve(policy, arguments, PolicyServer))


def _policy(arguments: argparse.Namespace) -> ReadyPolicy:
    from openpi_opt.deploy import load_policy

    verify = not arguments.no_verify
    asks = "the guard is asked first where this combination is new here; --no-verify does not"
    cli.say(f"loading ({asks})" if verify else "loading, without the guard")
    with warnings.catch_warnings():
        # As of a preset that was promoted on another machine.
        warnings.showwarning = lambda message, *_, **__: cli.say(f"warning: {message}")
        policy = load_policy(overrides=arguments.overrides, verify=verify, **arguments.settings)
    cfg = policy.config
    weights = cfg.weights.path or "random weights, which are for measuring only"
    cli.say(
        f"{cfg.model.name} with {weights}; rotary frequencies {cfg.model.rope_frequencies}; "
        f"any prompt up to {cfg.workload.prompt_slots} tokens"
        if cfg.workload.layout == "flexible"
        else f"{cfg.model.name} with {weights}; prompts of exactly {cfg.workload.prompt_tokens} "
        "tokens (workload.layout=flexible serves any)"
    )
    return policy


async def _serve(
    policy: ReadyPolicy, arguments: argparse.Namespace, kind: type[PolicyServer]
) -> int:
    assert policy.transforms is not None
    workload = policy.config.workload
    metadata = {**policy.transforms.robot.metadata, "action_horizon": workload.horizon}
    server = kind(
        policy.infer,
        metadata,
        arguments.host,
        arguments.port,
        arguments.queue,
        arguments.max_mib * 2**20,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop.set)
    listening: asyncio.Future[int] = loop.create_future()

    def ready(port: int) -> None:
        cli.say(f"listening on ws://{arguments.host}:{port}")
        listening.set_result(port)

    running = asyncio.ensure_future(server.run(ready))
    code = 0
    if arguments.fake_robot is not None:
        waiting: set[asyncio.Future[Any]] = {running, listening}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if listening.done():
            code = await _robots(listening.result(), arguments)
            server.stop.set()
    await running
    cli.say(f"{server.answered} requests answered, {server.refused} refused")
    return code


async def _robots(port: int, arguments: argparse.Namespace) -> int:
    """Run the fake robots, each in a process of its own; print and plot what they saw."""
    from openpi_opt.serve import fake_robot

    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.json" for index in range(arguments.clients)]
        robots = []
        try:
            for index, file in enumerate(files):
                command = [sys.executable, "-m", "openpi_opt.serve.fake_robot"]
                command += [arguments.settings["robot"], "--port", str(port)]
                command += ["--hz", str(arguments.fake_robot), "--seconds", str(arguments.seconds)]
                command += ["--seed", str(index), "--out", str(file)]
                robots.append(await asyncio.create_subprocess_exec(*command))
            codes = [await robot.wait() for robot in robots]
        finally:
            for robot in robots:
                with contextlib.suppress(ProcessLookupError):
                    robot.terminate()
        if any(codes):
            raise UserError(f"a fake robot ended with code {max(codes, key=abs)}; see above.")
        runs: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    print(fake_robot.report(runs))
    fake_robot.plot(runs, arguments.out / "fake_robot.png")
    (arguments.out / "fake_robot.json").write_text(json.dumps(runs))
    cli.say(f"plot and samples: {arguments.out}/")
    return 0


if __name__ == "__main__":
    cli.run(main)
