"""What conditioning on class names is worth: `python -m hyperclip_fast.bench.conditioning run | report | overheads`.

`run` works through the queue of bench/conditioning/queue.yaml, one run after the other; a run that was stopped goes on
where it was, one that has its log is not run again. `report` makes the tables and plots from the logs alone.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hyperclip_fast.bench.conditioning.arms import load_plan, load_runs
from hyperclip_fast.bench.conditioning.experiment import RESULTS, Experiment, write_log
from hyperclip_fast.bench.conditioning.logs import grouped, markdown, read_logs
from hyperclip_fast.bench.conditioning.names_report import names_section
from hyperclip_fast.bench.conditioning.overheads import measure_overheads, overheads_table
from hyperclip_fast.bench.conditioning.plots import draw
from hyperclip_fast.bench.conditioning.report import report
from hyperclip_fast.bench.conditioning.scores import mean
from hyperclip_fast.bench.conditioning.width import width_table, widths
from hyperclip_fast.utils.files import write_file

CONFIG = Path(__file__).with_name("queue.yaml")
OVERHEADS, CONCLUSION = "overheads.json", "conclusion.md"  # beside the logs; the report quotes both


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m hyperclip_fast.bench.conditioning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score what the queue still holds")
    run.add_argument("--only", nargs="+", metavar="NAME", help="groups or runs, such as w64 or w64-cross-0")
    report = commands.add_parser("report", help="make conditioning.md and the plots from the logs")
    report.add_argument("--results", default=RESULTS, metavar="DIR", help="logs; default: %(default)s")
    report.add_argument("--config", default=CONFIG, metavar="FILE", help="the queue; default: %(default)s")
    overheads = commands.add_parser("overheads", help="time the arms side by side, and the hypernetwork")
    overheads.add_argument("--results", default=RESULTS, metavar="DIR", help="default: %(default)s")
    overheads.add_argument("--seconds", type=float, default=60.0, help="of the training steps; default: %(default)s")
    run.add_argument("--config", default=CONFIG, metavar="FILE", help="default: %(default)s")
    run.add_argument("--results", default=RESULTS, metavar="DIR", help="logs; default: %(default)s")
    run.add_argument("--work", default="runs/conditioning", metavar="DIR", help="models; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        return {"run": _run, "report": _report, "overheads": _overheads}[args.command](args)
    except (ValueError, ImportError, OSError) as error:
        print(f"conditioning {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"conditioning {args.command}: stopped; the same command goes on from there", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    queue = load_runs(args.config)
    baselines = {(run.group, run.seed): run for run in queue if run.arm == "baseline"}
    experiment = Experiment(args.results, args.work)
    for run in (run for run in queue if not args.only or {run.group, run.name} & set(args.only)):
        experiment.run(run, baselines.get((run.group, run.seed)))
        scores = json.loads((Path(args.results) / f"{run.name}.jsonl").read_text().splitlines()[-1])["scores"]
        print(f"{run.name}: right {mean(scores['right']):.3f}", flush=True)
    return 0


def _report(args: argparse.Namespace) -> int:
    folder, scale = Path(args.results), load_plan(args.config)["position_scale"]
    logs = read_logs(folder)
    groups, named = (grouped(log for log in logs if (log.get("data") == "names") == names) for names in (False, True))
    if not groups:
        raise ValueError(f"results must have logs of runs on scenes, {folder} has those of {sorted(named)} alone")
    plots, pairs = draw(groups, folder), widths(groups)
    gains = markdown(width_table(pairs)) if pairs else ""
    measured = folder / OVERHEADS
    overheads = overheads_table(json.loads(measured.read_text())) if measured.exists() else ""
    words = folder / CONCLUSION
    conclusion = words.read_text(encoding="utf-8") if words.exists() else ""
    path = folder.with_suffix(".md")
    sections = [names_section(group, arms, folder) for group, arms in named.items()]
    text = report(folder, groups, plots, scale, overheads, conclusion, gains)
    write_file(path, "\n".join([text, *sections]))
    print(path)
    return 0


def _overheads(args: argparse.Namespace) -> int:
    figures = measure_overheads(args.seconds)
    write_log(Path(args.results) / OVERHEADS, [figures])
    print(overheads_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
