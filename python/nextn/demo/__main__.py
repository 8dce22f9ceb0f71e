"""`python -m nextn.demo`: make the embedded checkpoint from nothing, or measure one.

build runs all stages; each can also be called alone and goes on from what the work directory holds.
"""

import argparse
import sys
from pathlib import Path

from nextn.demo import pipeline

_STAGES = ("tokenizer", "target", "nextn", "quantize", "card")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nextn.demo", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "build": "all stages, one after the other",
        "tokenizer": "train the tokenizer",
        "target": "train the target model",
        "nextn": "train the NextN layer on the quantized target",
        "quantize": "write the checkpoint folder",
        "card": "measure the checkpoint and write its model card",
    }
    for name in ("build", *_STAGES):
        command = commands.add_parser(name, help=helps[name], allow_abbrev=False)
        command.add_argument("--work-dir", type=Path, required=True, help="training state and logs")
        command.add_argument("--out", type=Path, help="the checkpoint folder to write")
        command.add_argument("--resume", action="store_true", help="go on from the state in the work directory")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=2)
        for stage in ("target", "nextn"):
            budget = command.add_mutually_exclusive_group()
            budget.add_argument(f"--{stage}-minutes", type=float, help="train for so long (default)")
            budget.add_argument(f"--{stage}-steps", type=int, help="train for so many steps, repeatably")
        command.add_argument("--notes", default="", help="a remark on the training, for the card")
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint through nextn's engine", allow_abbrev=False)
    evaluate.add_argument("--model-path", type=Path, help="default: the embedded checkpoint")
    evaluate.add_argument("--json", type=Path, help="also write the figures there")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--show-wrong", type=int, default=0, metavar="N", help="print N wrong answers")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command == "evaluate":
        pipeline.run_evaluation(args.model_path, args.seed, args.json, args.show_wrong)
        return 0
    if args.out is None and args.command in ("build", "quantize", "card"):
        parser.error(f"{args.command} needs --out, the checkpoint folder")
    options = pipeline.BuildOptions(
        work_dir=args.work_dir,
        out=args.out,
        resume=args.resume,
        seed=args.seed,
        num_threads=args.threads,
        target_minutes=args.target_minutes,
        target_steps=args.target_steps,
        nextn_minutes=args.nextn_minutes,
        nextn_steps=args.nextn_steps,
        notes=args.notes,
    )
    pipeline.build(options, _STAGES if args.command == "build" else (args.command,))
    return 0


if __name__ == "__main__":
    sys.exit(main())
