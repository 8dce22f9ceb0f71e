"""Will this checkpoint serve, and draft? `python -m nextn.doctor CHECKPOINT`, from its headers alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from nextn.diagnosis.checkup import REFUSED, examine
from nextn.diagnosis.options import parse_options
from nextn.errors import NextnError


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and tell.

    Returns 0 fine, 1 serves but does not draft well, 2 refused, on GPUs at least, or wrong arguments.
    """
    options = parse_options(argv)
    try:
        diagnosis = examine(options)
        if options.as_json:
            print(json.dumps(diagnosis.as_dict(), indent=2))
        else:
            from nextn.diagnosis.show import make_console, show

            show(diagnosis, make_console())
        if options.plot is not None and diagnosis.memory:
            from nextn.diagnosis.plot import plot_memory

            plot_memory(diagnosis, options.plot)
    except NextnError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:
        return REFUSED
    except Exception as error:
        print(f"error: the doctor itself failed ({type(error).__name__}: {error}); please report it", file=sys.stderr)
        return REFUSED
    return diagnosis.exit_code


if __name__ == "__main__":
    sys.exit(main())
