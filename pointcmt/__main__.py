"""``python -m pointcmt``, and ``accelerate launch -m pointcmt`` for several GPUs."""

from pointcmt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
