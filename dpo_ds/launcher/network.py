"""By which of this machine's network interfaces another one is reached."""

import fcntl
import socket
import struct
from contextlib import closing, suppress

_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR, of Linux
_ANY_PORT = 9


def interface_to(address: str) -> str | None:
    """Returns an interface's name, or None where it cannot be told: it needs Linux and IPv4. Nothing is sent.

    Args:
        address: of the other machine, or of this one.
    """
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, _ANY_PORT))
        except OSError:
            return None
        mine = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, request)[20:24]) == mine:
                    return name
    return None
