"""``python -m lit_isdpo``."""

import signal

if __name__ == "__main__":
    heeds = signal.getsignal(signal.SIGINT) == signal.default_int_handler  # what runs behind a shell may ignore it
    if heeds:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: no traceback out of them
    from lit_isdpo.cli import main

    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
