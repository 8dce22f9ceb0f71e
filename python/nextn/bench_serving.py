"""Load generator: `python -m nextn.bench_serving --backend nextn --dataset-name random --num-prompts 100`."""

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nextn.bench.errors import BenchError
from nextn.bench.metrics import compute, details
from nextn.bench.options import parse_options
from nextn.bench.report import append_line, compare, format_table, json_line
from nextn.bench.runner import run_benchmark


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit code: 1 if it could not run or every request failed, 130 after Ctrl-C."""
    options = parse_options(argv)
    try:
        if options.compare:
            print(compare(*options.compare))
            return 0
        for flag, path in (("--output-file", options.output_file), ("--plot", options.plot)):
            _check_writable(flag, path)
        run = asyncio.run(run_benchmark(options))
        figures = compute(run)
        print(format_table(options, figures))
        if options.output_file:
            arrays = details(run) if options.output_details else {}
            append_line(options.output_file, json_line(options, run.model, figures, arrays))
        if options.plot:
            from nextn.bench.plot import plot_run

            plot_run(run, options.plot, f"{run.model} · {options.backend} · {figures['completed']} requests")
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: stopped before the end; there are no figures", file=sys.stderr)
        return 130
    return 0 if figures["completed"] else 1


def _check_writable(flag: str, path: str | Path | None) -> None:
    """Better before the run than after it."""
    folder = Path(path).resolve().parent if path else Path.cwd()
    if path and (Path(path).is_dir() or not os.access(folder, os.W_OK)):
        raise BenchError(f"{flag}: {path} cannot be written; give a file in a folder that exists")


if __name__ == "__main__":
    sys.exit(main())
