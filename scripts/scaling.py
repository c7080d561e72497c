"""How the step of a configuration scales with the number of chips, by compiling it for each number.

    python scripts/scaling.py --config configs/r1vl_7b_rl.yaml --size 7b --device h100 --counts 4,8,32,128,256

The questions grow with the chips (--questions of each), the train state is split over at most --fsdp chips. Prints a
Markdown table and, with --json, writes the plans. Times are those at the roofline, not measured.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

from r1vl_jax import config as configs
from r1vl_jax.planning.targets import parse_target, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--size", help="a published model (2b, 7b, 72b); default: that of model.path")
    parser.add_argument("--device", required=True, help="as in r1vl_jax.plan --target")
    parser.add_argument("--counts", default="4,8,32,128,256", help="numbers of chips (default %(default)s)")
    parser.add_argument("--questions", type=int, default=4, help="of each chip (default %(default)s)")
    parser.add_argument("--fsdp", type=int, default=8, help="chips that share a train state (default %(default)s)")
    parser.add_argument("--json", help="write the plans to this file")
    args, overrides = parser.parse_known_args()
    counts = [int(count) for count in args.counts.split(",")]
    prepare(parse_target(f"{args.device}:{max(counts)}"))
    from r1vl_jax.planning.planner import Planner, replaced  # uses devices

    plans = []
    for count in counts:
        fsdp = min(args.fsdp, count)
        sizes = {"mesh.data": count // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": 1}
        sizes |= {"rl.questions_per_step": args.questions * count, "rl.micro_batch_size": count}
        config = replaced(configs.load(args.config, overrides), sizes)
        planner = Planner(config, parse_target(f"{args.device}:{count}"), args.size)
        plans.append(planner.stage(config, "step_grpo"))
        if args.json:
            with open(args.json, "w") as file:
                json.dump([plan.to_json() for plan in plans], file, indent=1)
    print(
        "\n| chips | mesh: data, fsdp | peak, GB | rollout, s | reference, s | update, s | step, s | sent, GB a chip "
        "| seconds of links, network | bound of the gradient |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for count, plan in zip(counts, plans, strict=True):
        seconds: Counter[str] = Counter()
        waits: Counter[str] = Counter()
        for program in plan.programs:
            phase = {"reference": "reference", "gradient": "update", "update": "update"}.get(program.name, "rollout")
            seconds[phase] += program.time * program.times
            waits.update({bound: program.seconds[bound] * program.times for bound in ("link", "network")})
        sent = sum(sum(program.exchanged.values()) * program.times for program in plan.programs) / 1e9
        gradient = next(program for program in plan.programs if program.name == "gradient")
        print(
            f"| {count} | {plan.mesh['data']}, {plan.mesh['fsdp']} | {plan.largest.peak / 1e9:.1f} "
            f"| {seconds['rollout']:.2f} | {seconds['reference']:.2f} | {seconds['update']:.2f} | {plan.seconds:.2f} "
            f"| {sent:.0f} | {waits['link']:.2f}, {waits['network']:.2f} | {gradient.bound} |"
        )


if __name__ == "__main__":
    main()
