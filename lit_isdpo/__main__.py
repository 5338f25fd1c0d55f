"""``python -m lit_isdpo``."""

from lit_isdpo.cli import main

if __name__ == "__main__":
    main()
