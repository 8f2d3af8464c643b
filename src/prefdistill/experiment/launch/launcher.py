"""The process that runs accelerate's launcher: `python -m prefdistill.experiment.launch.launcher DIRECTORY ARGUMENT...`

The launcher reports a failed process in a traceback and many lines of log. Here it goes to a file: the run says what
the process itself said, or else how it ended.
"""

import logging
import subprocess
import sys
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from prefdistill.core.files import write_json
from prefdistill.experiment.launch.outcome import LAUNCHER, end_with_run, error_record


def main() -> int:
    end_with_run()
    logging.disable()
    note = Path(sys.argv[1]) / LAUNCHER
    try:
        launch_command(launch_command_parser().parse_args(sys.argv[2:]))
    except ChildFailedError as error:
        write_json(note, {"statuses": {rank: failure.exitcode for rank, failure in error.failures.items()}})
    except subprocess.CalledProcessError as error:  # of the only process
        write_json(note, {"statuses": {0: error.returncode}})
    except Exception as error:  # the launcher's own
        write_json(note, {"error": error_record(error)})
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
