"""The public key of a private key: X25519 with the base point (RFC 7748, section 5).

Plain integers, two milliseconds, not in constant time: it runs a few times in a daemon's life, on the daemon's own key, and
spares a dependency. Packets are encrypted by the kernel or wireguard-go.
"""

from __future__ import annotations

_P = 2**255 - 19
_A24 = 121665


def clamp(private_key: bytes) -> bytes:
    """The private key as X25519 uses it."""
    number = bytearray(private_key)
    number[0] &= 248
    number[31] = (number[31] & 127) | 64
    return bytes(number)


def public_key(private_key: bytes) -> bytes:
    """The public key, 32 bytes, of a private key of 32 bytes."""
    scalar = int.from_bytes(clamp(private_key), "little")
    x2, z2, x3, z3, swap = 1, 0, 9, 1, 0
    for bit in range(254, -1, -1):
        now = scalar >> bit & 1
        if swap != now:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = now
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % _P, b * b % _P, d * a % _P, c * b % _P
        difference = aa - bb
        x3, z3 = (da + cb) ** 2 % _P, 9 * (da - cb) ** 2 % _P
        x2, z2 = aa * bb % _P, difference * (aa + _A24 * difference) % _P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, _P - 2, _P) % _P).to_bytes(32, "little")
