"""What the processes of a launch do in tests: as a request says, by rank."""

import os
import signal
import time
from pathlib import Path

from prefdistill.core.errors import UserError
from prefdistill.experiment.launch.outcome import process_main


def work(request):
    rank = os.environ["RANK"]
    here = Path(request["directory"])
    (here / f"started-{rank}").write_text(str(os.getpid()))
    match request.get(rank, "wait"):
        case "return":
            return {"rank": int(rank), "standard input": os.fstat(0).st_mode}
        case "refuse":
            raise UserError("alpha is 7", "beta is 8", where="recipe.yaml")
        case "full disk":
            raise RuntimeError("unexpected pos 64 vs 0") from OSError(28, "No space left on device", "x")
        case "memory":
            raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (here / f"interrupted-{rank}").touch()
        raise
    return {}


if __name__ == "__main__":
    process_main(work)
