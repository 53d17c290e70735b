"""``python -m pointcmt``; ``torchrun --nproc-per-node N -m pointcmt`` for several processes."""

import os

from pointcmt.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from pointcmt.distributed import leave

        leave(code)
    raise SystemExit(code)
