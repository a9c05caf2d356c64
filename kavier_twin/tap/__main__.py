"""The process that makes records, as the proxy starts it: `python -m kavier_twin.tap DESCRIPTOR`."""

import socket
import sys

from kavier_twin.tap.worker import main, sent_settings

if __name__ == "__main__":
    hand_over = socket.socket(fileno=int(sys.argv[1]))
    main(hand_over, lambda: sent_settings(hand_over))
