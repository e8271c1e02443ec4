"""WireGuard devices, by the kernel (generic netlink) or by wireguard-go (its UAPI socket): the reconciler's driver for both.

Two codecs (genl, uapi) speak of the same values; two ways (inkernel, userspace) make devices and carry those values to them;
`edits` turns changes of objects into changes of peers, and the driver ties it together. Changes of many peers travel in one
transaction, and a peer that does not change is not mentioned in it.
"""
