"""``python -m pointcmt``; ``torchrun --nproc-per-node N -m pointcmt`` for several processes."""

from pointcmt.cli import run

if __name__ == "__main__":
    run()
